"""swin-hf predict and swin-hf explain: from what a user types to what stands on the screen, and how it can go wrong."""

import csv
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import _hub_server, hub  # noqa: F401 - fixtures
from PIL import Image
from transformers import ViTImageProcessor, pipeline

import swin_hf
from swin_hf import SwinHFBackbone, SwinHFConfig, SwinHFForImageClassification
from swin_hf.cli import main
from swin_hf.predict import PictureError, classify, find_pictures, load_classifier, predict, read_picture
from swin_hf.processing import UnreadablePictureError, decode_picture

ROOT = Path(__file__).parents[1]
NAMES = ["ant", "bee", "cat", "dog", "[eel]"]  # brackets: rich would take them for markup


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A classifier of five animals as ``save_pretrained`` writes it, with random weights that tell pictures apart."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = SwinHFConfig(
        image_size=(24, 32),
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 2),
        window_size=4,
        id2label=dict(enumerate(NAMES)),
    )
    model = SwinHFForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.normal_()
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 24, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 1024}, "the weights do not fit config.json"),
        ({"hidden_act": "nope"}, "hidden_act is 'nope'; it must be an activation of transformers"),
        ({"architectures": [["x"]]}, r"architectures.*\['x'\]"),
        (None, "model.safetensors.index.json points to '../outside.safetensors'"),
    ],
    ids=str,
)
def test_folder_is_checked_before_the_model_is_built(model_folder, tmp_path, monkeypatch, change, message):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    if change:
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    else:
        (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
        index = {"metadata": {}, "weight_map": {"classifier.bias": "../outside.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(SwinHFForImageClassification, "from_pretrained", lambda *a, **k: pytest.fail("it was built"))
    with pytest.raises(ValueError, match=message):
        load_classifier(str(folder))


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """A folder of seven good pictures in the working folder: sizes, modes and sub-folders differ."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(7):
        pixels = random.integers(0, 256, (20 + 5 * number, 60 - 6 * number, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).convert(["RGB", "L", "RGBA", "P", "CMYK", "RGB", "RGB"][number])
        suffix = [".png", ".png", ".png", ".gif", ".jpg", ".WEBP", ".png"][number]
        picture.save(folder / ("deeper" if number > 4 else "") / f"{number}{suffix}")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def run(capsys):
    """Call the command line; returns its exit code, standard output and standard error."""

    def call(*argv):
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
def test_scores_are_those_of_the_kind_of_problem(model_folder, pictures, kind):
    model, processor = load_classifier(str(model_folder))
    picture = read_picture(str(pictures / "0.png"))
    logits = model(**processor(images=picture, return_tensors="pt")).logits[0]
    expected = {
        "single_label_classification": logits.exp() / logits.exp().sum(),
        "multi_label_classification": 1 / (1 + (-logits).exp()),  # each label by itself
        "regression": logits,
    }[kind]
    model.config.problem_type = kind
    (guesses,) = classify(model, processor, [picture], top_k=5)
    assert [guess.index for guess in guesses] == logits.argsort(descending=True).tolist()
    for guess in guesses:
        assert guess.score == pytest.approx(expected[guess.index].item(), rel=1e-4, abs=1e-6)


def test_folder_is_classified_as_the_pipeline_of_transformers_does(run, model_folder, pictures):
    code, out, err = run("predict", model_folder, pictures, "--json", "--top-k", 5, "--batch-size", 3)
    assert (code, err) == (0, "")
    results = json.loads(out)
    expected = sorted(str(path) for path in pictures.rglob("*") if path.is_file() and path.suffix != ".txt")
    assert [result["image"] for result in results] == expected
    reference = pipeline("image-classification", model=str(model_folder), top_k=5)
    for result in results:
        theirs = reference(read_picture(result["image"]))
        assert [guess["label"] for guess in result["predictions"]] == [guess["label"] for guess in theirs]
        for ours, other in zip(result["predictions"], theirs, strict=True):
            assert ours["score"] == pytest.approx(other["score"], abs=1e-5)
            assert NAMES[ours["index"]] == ours["label"]


def test_csv_and_table_say_the_same(run, model_folder, pictures):
    picture = pictures / "0.png"
    _, out, _ = run("predict", model_folder, picture, "--csv", "--top-k", 5)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["rank"] for row in rows] == list("12345")
    assert {row["label"] for row in rows} == set(NAMES)
    assert sum(float(row["score"]) for row in rows) == pytest.approx(1, abs=1e-5)
    _, out, _ = run("predict", model_folder, picture, "--top-k", 5)
    lines = [line.split() for line in out.splitlines() if line.split()]
    assert lines[0] == ["image", "class", "score"]
    assert lines[2] == [str(picture), rows[0]["label"], f"{float(rows[0]['score']):.4f}"]
    assert [line[-2] for line in lines[2:]] == [row["label"] for row in rows]


def test_files_folders_and_patterns_are_found_once_and_in_order(pictures):
    found, problems = find_pictures(["pictures/4.jpg", "pictures/*.png", "pictures", "-", "https://example.org/a.png"])
    names = ["4.jpg", "0.png", "1.png", "2.png", "3.gif", "deeper/5.WEBP", "deeper/6.png"]
    assert found == [*(os.path.join("pictures", name) for name in names), "-", "https://example.org/a.png"]
    assert problems == []
    assert find_pictures(["**/6.png"])[0] == [os.path.join("pictures", "deeper", "6.png")]


def test_file_whose_name_looks_like_a_pattern_is_a_file(pictures):
    (pictures / "0.png").rename(pictures / "a[1].png")
    assert find_pictures(["pictures/a[1].png"]) == (["pictures/a[1].png"], [])


def test_standard_input_and_addresses(run, model_folder, pictures, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(pictures))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((pictures / "0.png").read_bytes())))
        code, out, err = run("predict", model_folder, "-", f"{address}/0.png", f"{address}/missing.png", "--json")
        server.shutdown()
    first, second = json.loads(out)
    assert first["predictions"] == second["predictions"]
    assert code == 1
    assert f"{address}/missing.png: cannot be fetched: HTTP Error 404" in err


def test_unreadable_pictures_are_reported_and_skipped(run, model_folder, pictures):
    (pictures / "broken.png").write_bytes(b"this is no picture")
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:300])
    code, out, err = run("predict", model_folder, pictures, "no-such.png", "--json", "--batch-size", 4)
    assert code == 1
    assert len(json.loads(out)) == 7
    assert "broken.png: cannot be read: it is not a picture, or a damaged one; open it in a viewer" in err
    assert "cut.png: cannot be read" in err
    assert "no-such.png: no such file or folder; check the spelling" in err
    assert "3 of 10 inputs could not be classified" in err


def test_nothing_but_unreadable_pictures_gives_an_empty_list(run, model_folder, pictures):
    code, out, err = run("predict", model_folder, pictures / "notes.txt", "--json")
    assert (code, json.loads(out)) == (1, [])
    assert "notes.txt: cannot be read" in err


@pytest.mark.parametrize("batch_size", [5, 16])
def test_no_more_pictures_are_held_in_full_size_than_threads_read(model_folder, tmp_path, monkeypatch, batch_size):
    for number in range(16):
        Image.new("RGB", (300 + number, 200), (16 * number, 0, 99)).save(tmp_path / f"{number:02}.png")
    sources = sorted(map(str, tmp_path.iterdir()))
    model, processor = load_classifier(str(model_folder), device="cpu")
    expected = classify(model, processor, [read_picture(source) for source in sources])

    taken, most, read = [], [], swin_hf.predict.read_picture

    def watched(source, mode, processor):
        picture = read(source, mode, processor)
        taken.append(weakref.ref(picture))
        most.append(sum(reference() is not None for reference in taken))
        return picture

    monkeypatch.setattr(swin_hf.predict, "read_picture", watched)
    results = list(predict(model, processor, sources, batch_size=batch_size))
    assert len(taken) == 16 and max(most) <= swin_hf.predict.READERS + 1  # one may be on its way out
    assert [source for source, _ in results] == sources
    for (_, guesses), others in zip(results, expected, strict=True):
        assert [guess.index for guess in guesses] == [guess.index for guess in others]
        assert [guess.score for guess in guesses] == pytest.approx([guess.score for guess in others], abs=1e-5)


def test_odd_modes_become_what_training_makes_of_them(tmp_path):
    """By the same rules; see swin_hf.model.pixels.to_8_bits."""
    from swin_hf.processing import decode_picture

    random = np.random.default_rng(0)
    deep = Image.fromarray(random.integers(0, 65536, (9, 7), dtype=np.uint16))
    floats = Image.fromarray(random.random((9, 7), dtype=np.float32))
    clear = Image.fromarray(random.integers(0, 256, (9, 7, 4), dtype=np.uint8))
    turned = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    for name, picture, options in [
        ("deep.png", deep, {}),
        ("floats.tiff", floats, {}),
        ("clear.png", clear, {}),
        ("palette.gif", clear.convert("P"), {"transparency": 0}),
        ("two.png", clear.convert("LA"), {}),
        ("bits.png", clear.convert("1"), {}),
        ("print.jpg", clear.convert("CMYK"), {}),
        ("turned.png", turned, {"exif": exif}),
    ]:
        path = tmp_path / name
        picture.save(path, **options)
        for channels, mode in ((3, "RGB"), (1, "L")):
            ours, theirs = read_picture(str(path), channels), decode_picture(path.read_bytes(), channels)
            assert ours.mode == theirs.mode == mode
            assert np.array_equal(np.asarray(ours), np.asarray(theirs)), name
    assert read_picture(str(tmp_path / "turned.png")).size == (9, 7)


def test_grey_values_without_a_scale_are_unreadable(tmp_path):
    path = tmp_path / "heights.tiff"
    Image.fromarray(np.full((4, 4), 900, dtype=np.float32)).save(path)
    with pytest.raises(PictureError, match="floating-point grey values reach 900; the range is"):
        read_picture(str(path))


def test_download_that_never_ends_is_cut_off(monkeypatch):
    monkeypatch.setattr("swin_hf.predict.DOWNLOAD_BYTES", 100)

    class Endless(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bytes(1000))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(PictureError, match="more than 0 MiB"):
            read_picture(f"http://127.0.0.1:{server.server_port}/x.png")
        server.shutdown()


def test_dtype_and_device_are_obeyed(run, model_folder, pictures):
    model, _ = load_classifier(str(model_folder), device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu" and not model.training
    code, out, _ = run("predict", model_folder, pictures / "0.png", "--json", "--dtype", "bfloat16", "--device", "cpu")
    exact = json.loads(run("predict", model_folder, pictures / "0.png", "--json")[1])
    assert code == 0
    assert json.loads(out)[0]["predictions"][0]["score"] == pytest.approx(exact[0]["predictions"][0]["score"], abs=0.03)


def test_foreign_checkpoint_gives_the_same_answer(run, model_folder, pictures, tmp_path):
    from safetensors.torch import save_file

    model, _ = load_classifier(str(model_folder))
    weights = tmp_path / "weights.safetensors"
    save_file(swin_hf.export_checkpoint(model, "torchvision"), weights)
    ViTImageProcessor(size={"height": 24, "width": 32}).save_pretrained(tmp_path)
    foreign, processor = load_classifier(str(weights))
    ours = [guesses for _, guesses in predict(model, processor, [str(pictures / "0.png")], top_k=5)]
    theirs = [guesses for _, guesses in predict(foreign, processor, [str(pictures / "0.png")], top_k=5)]
    assert [guess.index for guess in ours[0]] == [guess.index for guess in theirs[0]]
    code, out, err = run("predict", weights, pictures / "0.png", "--json")
    assert code == 0
    assert "has no names for its 5 classes; they are shown by number" in err
    assert json.loads(out)[0]["predictions"][0]["label"].startswith("LABEL_")


def test_checkpoint_without_a_classifier_is_refused(run, model_folder, pictures, tmp_path):
    from safetensors.torch import save_file

    model, _ = load_classifier(str(model_folder))
    state = {k: v for k, v in swin_hf.export_checkpoint(model, "torchvision").items() if not k.startswith("head.")}
    save_file(state, tmp_path / "headless.safetensors")
    code, _, err = run("predict", tmp_path / "headless.safetensors", pictures / "0.png")
    assert code == 2
    assert "has no classifier; fine-tune it first: swin-hf train" in err


def test_hub_id_is_pulled(run, model_folder, pictures, hub, monkeypatch):  # noqa: F811
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    hub.put("user/animals", {path.name: path.read_bytes() for path in model_folder.iterdir()})
    expected = run("predict", model_folder, pictures / "0.png", "--json")[1]
    code, out, err = run("predict", "user/animals", pictures / "0.png", "--json")
    assert (code, out) == (0, expected), err
    code, _, err = run("predict", "user/anymals", pictures / "0.png")
    assert code == 2
    assert "there is no folder user/anymals here, and there is no repository user/anymals" in err


def make_headless(folder):
    config = SwinHFConfig(image_size=24, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4, num_labels=0)
    SwinHFForImageClassification(config).save_pretrained(folder)


def make_backbone(folder):
    SwinHFBackbone(SwinHFConfig(image_size=24, embed_dim=16, depths=(1,), num_heads=(2,))).save_pretrained(folder)


def make_shallow(folder):
    """Weights of one block, a configuration of two."""
    config = SwinHFConfig(image_size=24, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4)
    SwinHFForImageClassification(config).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "depths": [2]}))


@pytest.mark.parametrize("verb", ["predict", "explain"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_headless, r"has no classifier; fine-tune it first"),
        (make_backbone, r"is a SwinHFBackbone, which has no classes; fine-tune it first"),
        (make_shallow, r"swin.stages.0.blocks.1"),
    ],
)
def test_model_that_cannot_classify_is_refused(run, pictures, tmp_path, verb, make, message):
    folder = tmp_path / "wrong"
    make(folder)
    code, out, err = run(verb, folder, pictures / "0.png")
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("verb", ["predict", "explain"])
@pytest.mark.parametrize("model", ["no such model", "pictures/no-such", "weights.pth", "a/b/c"])
def test_unknown_model_is_refused(run, pictures, verb, model):
    code, _, err = run(verb, model, pictures / "0.png")
    assert code == 2
    assert f"{model!r} does not exist; give the folder of a model or of a training run" in err


@pytest.mark.parametrize("verb", ["predict", "explain"])
def test_inputs_that_lead_nowhere_are_refused_before_the_model_is_loaded(run, pictures, tmp_path, verb):
    (tmp_path / "empty").mkdir()
    for argument, message in [
        ("nothing.png", "nothing.png: no such file or folder"),
        ("empty", "empty: the folder holds no picture; name files, or a folder with some of .avif .bmp"),
        ("nothing-*.png", "nothing-*.png: nothing matches the pattern"),
    ]:
        code, out, err = run(verb, "no such model", argument)
        assert (code, out) == (2, "")
        assert message in err and "no such model" not in err


@pytest.mark.parametrize("verb", ["predict", "explain", "export"])
@pytest.mark.parametrize(("limit", "most"), [(100, "at most 200"), (200, "at most 200 without a warning")])
def test_picture_that_pillow_calls_too_large_is_reported_as_that(
    run, model_folder, pictures, tmp_path, monkeypatch, verb, limit, most
):
    Image.new("RGB", (20, 15)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow warns above it and refuses above twice of it
    options = ["--to", "torch", "--images"] if verb == "export" else []
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        code, _, err = run(verb, model_folder, *options, tmp_path / "large.png")
    assert code != 0
    assert f"large.png: cannot be read: it has 300 pixels and Pillow reads {most}; make it smaller" in err
    with warnings.catch_warnings(), pytest.raises(UnreadablePictureError, match=r"large\.png: .*it has 300 pixels"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        decode_picture({"bytes": None, "path": str(tmp_path / "large.png")})


def test_device_that_is_not_there_is_refused(run, model_folder, pictures):
    code, _, err = run("predict", model_folder, pictures / "0.png", "--device", "tpu")
    assert code == 2
    assert "device 'tpu' is not available here; choose one of auto, cpu" in err
    with pytest.raises(ValueError, match="dtype 'int4' is unknown"):
        load_classifier(str(model_folder), dtype="int4")


@pytest.mark.parametrize("option", [("--top-k", "0"), ("--batch-size", "-1"), ("--dtype", "int4"), ("--json", "--csv")])
def test_wrong_options_are_refused(model_folder, pictures, option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(model_folder), str(pictures), *option])
    assert stop.value.code == 2
    assert "swin-hf predict: argument" in capsys.readouterr().err


def test_model_of_five_channels_reads_no_photographs_and_draws_on_none(run, pictures, tmp_path):
    config = SwinHFConfig(image_size=24, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4, num_channels=5)
    SwinHFForImageClassification(config).save_pretrained(tmp_path / "five")
    np.save(tmp_path / "bands.npy", np.zeros((30, 24, 5)))
    code, out, err = run("predict", tmp_path / "five", pictures / "0.png", tmp_path / "bands.npy", "--csv")
    assert code == 1 and f"{tmp_path / 'bands.npy'},1," in out
    assert "0.png: cannot be read: it has 3 channels, and 5 are wanted (num_channels)" in err
    code, _, err = run("explain", tmp_path / "five", tmp_path / "bands.npy")
    assert code == 2 and "the model takes 5 channels, and maps are drawn on pictures of 1 or 3" in err


@pytest.mark.parametrize("verb", ["predict", "explain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=["nan", "inf", "overflow"])
def test_scores_that_are_no_numbers_are_an_error(run, model_folder, pictures, tmp_path, verb, value):
    """Weights of 3e38 are numbers; their sum is not."""
    model = SwinHFForImageClassification.from_pretrained(model_folder)
    with torch.no_grad():
        model.classifier.weight[0] = value
    model.save_pretrained(tmp_path / "broken")
    code, out, err = run(verb, tmp_path / "broken", pictures / "0.png")
    assert (code, out) == (2, "")
    assert "the model gives NaN or infinite scores for 1 of 1 pictures" in err


def test_explanation_is_written_and_named_after_the_picture(run, model_folder, pictures):
    code, out, err = run("explain", model_folder, pictures / "4.jpg", "--pixel", 23, 31, "--target", "[eel]")
    assert (code, err) == (0, "")
    assert out.startswith(f"4-explained.png: {pictures / '4.jpg'} is ")
    assert "Grad-CAM for [eel], attention from pixel 23 31 of the 24x32 picture" in out
    with Image.open("4-explained.png") as drawn:
        assert drawn.width > 500

    code, _, err = run("explain", model_folder, pictures / "4.jpg")
    assert code == 2
    assert "4-explained.png exists; choose another --output, or give --overwrite" in err
    code, out, _ = run("explain", model_folder, pictures / "4.jpg", "--overwrite", "--target", 2, "--stage", 2)
    assert code == 0
    assert "Grad-CAM for cat" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--target", "fox"),
            "'fox' is not a class of the model; choose a name, or a number below 5: ant, bee",
        ),
        (("--target", "5"), "'5' is not a class of the model"),
        (("--stage", "3"), "--stage 3 does not exist; the model has stages 1 to 2"),
        (("--pixel", "24", "0"), "pixel (24, 0) is outside the 24x32 image"),
        (("--output", "no/such/folder.png"), "the folder no/such does not exist; make it first"),
        (("--output", "map.pdf"), "map.pdf does not end in .png, and a PNG is written; choose another --output"),
    ],
)
def test_wrong_wishes_for_an_explanation_are_refused(run, model_folder, pictures, arguments, message):
    code, out, err = run("explain", model_folder, pictures / "0.png", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(Path.cwd().glob("*.png"))


def test_only_one_picture_is_explained_at_a_time(run, model_folder, pictures):
    code, _, err = run("explain", model_folder, "pictures")
    assert code == 2
    assert "pictures matches 7 images; explain them one by one" in err
    code, _, err = run("explain", model_folder, pictures / "notes.txt")
    assert code == 2
    assert "notes.txt: cannot be read" in err


def test_a_prediction_starts_without_the_libraries_of_the_training(model_folder, pictures):
    """They take longer to import than a picture takes to classify."""
    heavy = [
        "lightning",
        "datasets",
        "matplotlib",
        "pandas",
        "sklearn",
        "timm",
        "peft",
        "tensorboard",
        "onnx",
        "onnxruntime",
        "openvino",
    ]
    code = "import sys; from swin_hf.cli import main; code = main(sys.argv[1:4])\n"
    code += "sys.exit(code or ' '.join(name for name in sys.argv[4:] if name in sys.modules) or 0)"
    shown = "import sys; from transformers import AutoImageProcessor; print(*sys.modules)"  # before 5.13, two of them
    loaded = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stdout.split()
    heavy = [name for name in heavy if name not in loaded]
    command = [sys.executable, "-c", code, "predict", str(model_folder), str(pictures / "0.png"), *heavy]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
