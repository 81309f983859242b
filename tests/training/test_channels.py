"""Pictures of any number of channels: how files are read and refused, what is measured, and whole runs on them."""

import csv
import io
import json
import pickle
import struct

import numpy as np
import pytest
import torch
from conftest import TRAINING_WARNINGS
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForSemanticSegmentation

from swin_hf import SwinHFConfig, SwinHFForImageClassification
from swin_hf.cli import main
from swin_hf.predict import PictureError, classify, load_classifier, predict, read_picture
from swin_hf.processing import Preprocessing, UnreadablePictureError, as_rgb, decode_picture
from swin_hf.segment import LEGEND_WIDTH, predict_masks
from swin_hf.training import (
    ImageDataModule,
    Masks,
    Pixels,
    Reading,
    SegmentationDataModule,
    train,
)

pytestmark = [
    *TRAINING_WARNINGS,
    pytest.mark.filterwarnings("ignore:.* has no names for its"),
    pytest.mark.filterwarnings("ignore:.*shortened"),
]

SHAPE = (20, 24)
NETWORK = {"overrides": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}, "drop_path_rate": 0.0}
OPTIONS = {
    "preset": "swin_digits_patch4_window4_32",
    "image_size": 16,
    "batch_size": 8,
    "num_workers": 0,
    "network": NETWORK,
    "optimization": {"lr_scaling": False, "learning_rate": 3e-3, "warmup_epochs": 0},
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
}


def values(label: int, channels: int, seed: int) -> np.ndarray:
    """Noise in 0..1 whose last channel tells the class."""
    random = np.random.default_rng(seed)
    found = random.uniform(0.1, 0.4, (*SHAPE, channels))
    found[..., -1] += 0.5 * label
    return found


def write_npy(path, label, seed, channels=5):
    np.save(path.with_suffix(".npy"), values(label, channels, seed).astype(np.float32))


def write_tiff(path, label, seed):
    bands = (values(label, 4, seed) * 255).astype(np.uint8)
    Pictures.fromarray(bands, "RGBA").save(path.with_suffix(".tif"))


def write_folder(root, write, splits=(("train", 16), ("val", 4), ("test", 5))):
    for split, count in splits:
        for number in range(count):
            folder = root / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / f"{number}", number % 2, number)
    return root


def cell(array) -> dict:
    """A cell of a column that holds an array."""
    stream = io.BytesIO()
    np.save(stream, array)
    return {"bytes": stream.getvalue(), "path": "x.npy"}


# How values are read.


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [("uint8", 1), ("uint16", 255 / 65535), (">u2", 255 / 65535), ("int16", 255), ("float64", 255), ("bool", 255)],
)
def test_values_are_scaled_by_their_type(dtype, factor):
    array = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 200, (4, 6, 5)).astype(dtype)
    picture = decode_picture(cell(array), 5)
    assert picture.dtype == torch.float32 and picture.shape == (5, 4, 6)
    np.testing.assert_allclose(picture.numpy(), array.transpose(2, 0, 1).astype("f8") * factor, rtol=1e-6)
    assert torch.equal(picture, decode_picture(cell(np.asfortranarray(array)), 5))


def test_white_of_16_bits_can_be_given():
    array = np.full((2, 2, 4), 10000, np.uint16)
    assert decode_picture(cell(array), 4, grey_maximum=10000).unique().tolist() == [255]


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_1_and_3_channels_are_pictures(channels):
    array = np.random.default_rng(0).integers(0, 256, (4, 6, channels), dtype=np.uint8)
    picture = decode_picture(cell(array), channels)
    assert np.array_equal(np.atleast_3d(np.asarray(picture)), array)
    wide = decode_picture(cell(array.astype(np.uint16) * 257), channels)
    assert np.array_equal(np.asarray(wide), np.asarray(picture))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 2, 4)), "it has 4 channels, and 5 are wanted"),
        (np.full((2, 2, 5), np.nan), "it holds NaN, infinity or numbers beyond those of float32"),
        (np.full((2, 2, 5), 1e300), "it holds NaN, infinity or numbers beyond those of float32"),
        (np.zeros((0, 2, 5)), r"it is an array of shape \(0, 2, 5\); a picture is \(height, width, channels\)"),
        (np.zeros(5), r"it is an array of shape \(5,\)"),
        (np.zeros((1, 2, 2, 5)), r"it is an array of shape \(1, 2, 2, 5\)"),
        (np.zeros((2, 2, 5), complex), "it holds values of type complex128"),
        (np.array([["a"]]), "it holds values of type <U1"),
    ],
)
def test_arrays_that_are_no_pictures_are_named(array, words):
    with pytest.raises(UnreadablePictureError, match=f"x.npy: PixelsError: {words}"):
        decode_picture(cell(array), 5)


class Bomb:
    """An object whose unpickling would be seen."""

    def __reduce__(self):
        return print, ("unpickled",)


def test_pickled_objects_are_refused_and_not_loaded(tmp_path, capsys):
    np.save(tmp_path / "objects.npy", np.array([[Bomb()]], dtype=object), allow_pickle=True)
    with pytest.raises(UnreadablePictureError, match="it holds pickled Python objects, which are never loaded"):
        decode_picture(str(tmp_path / "objects.npy"), 5)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UnreadablePictureError, match=r"it is not a \.npy file of numbers"):
        decode_picture(str(tmp_path / "bare.npy"), 5)
    assert capsys.readouterr().out == ""


def test_a_cut_off_array_is_named_before_memory_is_asked_for():
    content = cell(np.zeros((2, 2, 5)))["bytes"]
    with pytest.raises(UnreadablePictureError, match="it has 157 bytes for an array of 160; it is cut off or damaged"):
        decode_picture(content[:-3], 5)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**9, 5)})
    with pytest.raises(UnreadablePictureError, match="it has 0 bytes for an array of 40000000000000000000"):
        decode_picture(header.getvalue(), 5)


def tiff_of_bands(path, count: int, bits: int = 8) -> None:
    """A TIFF of 2 x 2 pixels of red, green, blue and other bands, which Pillow does not write."""
    extra = count - 3
    size = 4 * count * bits // 8
    entries = [
        (256, 3, 1, 2), (257, 3, 1, 2), (258, 3, count, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 300),
        (277, 3, 1, count), (278, 3, 1, 2), (279, 4, 1, size), (338, 3, extra, 0 if extra <= 2 else 230),
    ]  # fmt: skip
    content = bytearray(300) + bytes(range(size))
    struct.pack_into("<2sHIH", content, 0, b"II", 42, 8, len(entries))
    for place, (tag, kind, number, value) in enumerate(entries):
        struct.pack_into("<HHII", content, 10 + 12 * place, tag, kind, number, value)
    struct.pack_into(f"<{count}H", content, 200, *[bits] * count)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("count", "bits", "words"),
    [(4, 8, "it has 4 bands, of which Pillow reads 3"), (5, 8, "it has 5 bands, of which Pillow reads 3")],
)
def test_bands_that_pillow_drops_are_told(count, bits, words, tmp_path):
    tiff_of_bands(tmp_path / "bands.tif", count, bits)
    with Pictures.open(tmp_path / "bands.tif") as picture:
        assert picture.mode == "RGB"
    with pytest.raises(UnreadablePictureError, match=f"{words}; save it as .npy"):
        decode_picture(str(tmp_path / "bands.tif"), count)


def test_pages_of_a_tiff_are_channels(tmp_path):
    bands = np.random.default_rng(0).integers(0, 65536, (6, 4, 7)).astype(np.uint16)
    first, *others = (Pictures.fromarray(band) for band in bands)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=others)
    picture = decode_picture(str(tmp_path / "pages.tif"), 6)
    np.testing.assert_allclose(picture.numpy(), bands * (255 / 65535), rtol=1e-6)
    Pictures.new("L", (4, 4)).save(tmp_path / "sizes.tif", save_all=True, append_images=[Pictures.new("L", (5, 4))])
    with pytest.raises(UnreadablePictureError, match="its 2 pages differ in size"):
        decode_picture(str(tmp_path / "sizes.tif"), 2)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "CMYK"])
def test_bands_of_a_picture_are_channels_as_they_are(mode, tmp_path):
    channels = len(Pictures.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(0).integers(0, 256, (4, 6, channels), dtype=np.uint8)
    Pictures.fromarray(array, mode).save(tmp_path / "x.tif")
    picture = decode_picture(str(tmp_path / "x.tif"), channels)
    assert np.array_equal(picture.numpy(), array.transpose(2, 0, 1))


def test_many_channels_are_shown_by_the_first_three():
    picture = torch.randn(5, 4, 6) * 1000
    shown = np.asarray(as_rgb(picture))
    assert shown.shape == (4, 6, 3) and shown.min() == 0 and shown.max() == 255
    assert shown[..., 1].flatten().argmax() == picture[1].flatten().argmax()
    assert np.asarray(as_rgb(picture[:2]))[..., 2].flatten().argmax() == picture[0].flatten().argmax()
    assert np.asarray(as_rgb(torch.ones(4, 2, 2))).max() == 0


# What is found in the data.


def module(folder, **options) -> ImageDataModule:
    return ImageDataModule(str(folder), **({"image_size": 16, "batch_size": 8, "num_workers": 0} | options))


def test_mean_and_deviation_are_measured_and_saved(tmp_path):
    data = module(write_folder(tmp_path, write_npy), pixels=Pixels(interpolation="nearest"), image_size=SHAPE)
    data.load()
    assert data.num_channels == 5
    train = np.stack([values(number % 2, 5, number) for number in range(16)]).astype("f4").astype("f8")
    np.testing.assert_allclose(data.mean, train.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(data.std, train.std((0, 1, 2)), rtol=1e-5)
    processor = data.image_processor()
    assert list(processor.image_mean) == data.mean and list(processor.image_std) == data.std
    (batch,) = data.test_dataloader()
    pixels = data.on_after_batch_transfer(batch, 0)["pixel_values"]
    assert pixels.shape == (5, 5, *SHAPE) and pixels.dtype == torch.float32
    assert float(pixels.mean(dim=(0, 2, 3)).abs().max()) < 0.5  # normalised


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_channels": 4}, r"0\.npy has 5, and num_channels is 4"),
        ({"pixels": Pixels(mean=[0.5] * 3, std=[0.5] * 3)}, "3 values .* in mean or std for 5 channels"),
        ({"reading": Reading(streaming=True)}, 'mean="dataset" needs the pictures at hand'),
    ],
)
def test_options_that_do_not_fit_five_channels_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        module(write_folder(tmp_path, write_npy), **options).load()


def test_files_of_different_channels_are_named_both(tmp_path):
    write_folder(tmp_path, write_npy)
    write_npy(tmp_path / "train" / "b" / "odd", 1, 0, channels=6)
    with pytest.raises(ValueError, match=r"same number of channels .*: .*odd\.npy has 6, and .*0\.npy 5"):
        module(tmp_path).load()
    Pictures.new("RGB", (4, 4)).save(tmp_path / "train" / "a" / "photo.png")
    (tmp_path / "train" / "b" / "odd.npy").unlink()
    with pytest.raises(ValueError, match=r"photo\.png has 3, and .*0\.npy 5"):
        module(tmp_path).load()


def test_a_channel_that_is_always_the_same_is_named(tmp_path):
    def write(path, label, seed):
        array = values(label, 5, seed)
        array[..., 2] = 7.5
        np.save(path.with_suffix(".npy"), array)

    with pytest.raises(ValueError, match=r"of one colour: channel 2, counted from 0, is 7\.5 with"):
        module(write_folder(tmp_path, write)).load()


def test_a_tiff_that_is_read_in_part_is_told(tmp_path):
    def write(path, label, seed):
        tiff_of_bands(path.with_suffix(".tif"), 5)

    with pytest.warns(UserWarning, match=r"0\.tif holds 5 channels .*, and 2 of them are not read; .*num_channels 5"):
        module(write_folder(tmp_path, write)).load()


def test_a_picture_that_cannot_be_read_later_is_named_or_counted(tmp_path):
    write_folder(tmp_path, write_npy)
    array = values(0, 5, 3)
    array[3, 3, 3] = np.nan
    np.save(tmp_path / "test" / "a" / "0.npy", array)
    with pytest.raises(UnreadablePictureError, match=r"0\.npy: PixelsError: it holds NaN"):
        list(module(tmp_path).test_dataloader())
    (batch,) = module(tmp_path, reading=Reading(on_error="skip")).test_dataloader()
    assert len(batch["labels"]) == 4 and "holds NaN" in batch["unreadable"][0]


def test_columns_hold_arrays_or_their_paths(tmp_path):
    write_folder(tmp_path / "files", write_npy)
    paths = sorted((tmp_path / "files" / "train").rglob("*.npy"))
    labels = [int(path.parent.name == "b") for path in paths]
    names = ClassLabel(names=["a", "b"])
    stored = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    Dataset.from_dict(
        {"image": stored, "label": labels}, Features({"image": Image(decode=False), "label": names})
    ).to_parquet(tmp_path / "bytes.parquet")
    Dataset.from_dict(
        {"image": list(map(str, paths)), "label": labels}, Features({"image": Value("string"), "label": names})
    ).to_parquet(tmp_path / "paths.parquet")
    batches = []
    for kind in ("bytes", "paths"):
        data = ImageDataModule("parquet", str(tmp_path / f"{kind}.parquet"), image_size=16, num_workers=0)
        data.load()
        assert data.num_channels == 5
        batches.append(next(iter(data.val_dataloader())))
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])


@pytest.mark.parametrize("options", [{"resize_mode": "squash"}, {"interpolation": "bilinear", "crop_pct": 0.9}])
def test_the_image_processor_gives_the_pixels_of_the_evaluation(options, tmp_path):
    write_folder(tmp_path / "data", write_npy)
    data = module(tmp_path / "data", pixels=Pixels(**options), image_size=(16, 12))
    data.image_processor().save_pretrained(tmp_path / "model")
    SwinHFConfig().save_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    (batch,) = data.test_dataloader()
    ours = data.on_after_batch_transfer(batch, 0)["pixel_values"]
    for place, path in enumerate(sorted((tmp_path / "data" / "test").rglob("*.npy"))):
        for given in (str(path), decode_picture(str(path), 5)):
            assert torch.equal(ours[place], processor(given, return_tensors="pt")["pixel_values"][0])
    with pytest.raises(ValueError, match="PIL resizes no pictures of 5 channels; use the torchvision backend"):
        data.preprocessing.processor("pil")(str(path))


# Whole runs.


@pytest.mark.parametrize(("write", "channels"), [(write_npy, 5), (write_tiff, 4)], ids=["npy", "tiff"])
def test_a_run_is_trained_saved_loaded_and_predicts_alike(write, channels, tmp_path, capsys):
    folder = write_folder(tmp_path / "data", write)
    options = OPTIONS | ({"num_channels": 4} if channels == 4 else {})  # the bands of a TIFF are asked for
    run = train(str(folder), runs=str(tmp_path / "runs"), **options)
    model = AutoModelForImageClassification.from_pretrained(run.folder / "model").eval()
    processor = AutoImageProcessor.from_pretrained(run.folder / "model")
    assert model.config.num_channels == channels == len(processor.image_mean)
    assert (run.folder / "worst_pictures.png").is_file()
    with open(run.folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    capsys.readouterr()
    assert main(["predict", str(run.folder), str(folder / "test"), "--csv", "--top-k", "1"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["image"] for row in found] == [row["path"] for row in rows]
    for row, answer in zip(rows, found, strict=True):
        assert row["prediction"] == answer["label"]
        assert float(row["probability"]) == pytest.approx(float(answer["score"]), abs=1e-5)
        with torch.no_grad():
            (shares,) = model(**processor(row["path"], return_tensors="pt")).logits.softmax(-1)
        assert float(shares.max()) == pytest.approx(float(row["probability"]), abs=1e-5)


@pytest.mark.parametrize("measured", ["--ckpt_path=checkpoints/best.ckpt", "--model.weights=model"])
@pytest.mark.parametrize("splits", [("test",), ("train", "test")], ids="-".join)
def test_a_model_sees_other_data_as_those_of_its_training(splits, measured, tmp_path):
    def write_brighter(path, label, seed):
        np.save(path.with_suffix(".npy"), (values(label, 5, seed) + 0.3).astype(np.float32))

    run = train(str(write_folder(tmp_path / "arrays", write_npy)), runs=str(tmp_path / "runs"), **OPTIONS)
    other = write_folder(tmp_path / "brighter", write_brighter, [(split, 6) for split in splits])
    words = ["train", "test", "--config", str(run.folder / "config.yaml"), "--data.dataset", str(other)]
    assert main([*words, measured.replace("=", f"={run.folder}/")]) == 0
    with (run.folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    model, processor = load_classifier(str(run.folder / "model"))
    answers = classify(model, processor, [read_picture(row["path"], 5, processor) for row in rows], top_k=1)
    assert len(rows) == 6 and [row["prediction"] for row in rows] == [answer[0].label for answer in answers]
    shares = [float(row["probability"]) for row in rows]
    assert shares == pytest.approx([answer[0].score for answer in answers], abs=1e-4)


def test_a_starting_point_of_three_channels_is_widened_and_told(tmp_path, caplog):
    torch.manual_seed(0)
    config = {"image_size": 16, "window_size": 4, "patch_size": 2, **NETWORK["overrides"]}
    SwinHFForImageClassification(SwinHFConfig(**config)).save_pretrained(tmp_path / "rgb")
    folder = write_folder(tmp_path / "data", write_npy)
    options = {name: OPTIONS[name] for name in OPTIONS if name not in ("preset", "network")}
    with caplog.at_level("INFO"):
        run = train(str(folder), weights=str(tmp_path / "rgb"), runs=str(tmp_path / "runs"), **options)
    assert "auto_augment trivialaugment is left out: it changes colours, and these pictures have 5" in caplog.text
    facts = json.loads((run.folder / "model" / "training_facts.json").read_text())
    assert "auto_augment" not in facts["hyper_parameters"]
    assert "the starting point takes 3 channels: their weights are taken in turn for 5" in caplog.text
    assert run.model.config.num_channels == 5


def test_regression_learns_from_arrays(tmp_path):
    write_folder(tmp_path / "files", write_npy)
    paths = sorted((tmp_path / "files" / "train").rglob("*.npy"))
    rows = {"path": list(map(str, paths)), "height": [float(np.load(path).mean()) for path in paths]}
    Dataset.from_dict(rows).to_csv(tmp_path / "table.csv")
    reading = {"label_column": "height"}
    options = OPTIONS | {"data_files": str(tmp_path / "table.csv"), "reading": reading}
    run = train("csv", "image-regression", runs=str(tmp_path / "runs"), **options)
    assert run.model.config.num_channels == 5 and np.isfinite(run.metrics["val_mae"])


def test_a_segmenter_learns_from_arrays_and_masks_of_arrays(tmp_path, caplog):
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for kind in ("images", "masks"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for number in range(count):
            array, mask = values(0, 5, number), np.zeros(SHAPE, np.uint8)
            mask[4:12, 5:15] = 1
            array[mask == 1, 3] += 0.5
            np.save(tmp_path / "data" / split / "images" / f"{number}.npy", array)
            np.save(tmp_path / "data" / split / "masks" / f"{number}.npy", mask)
    options = {name: OPTIONS[name] for name in ("preset", "image_size", "num_workers", "trainer")}
    head = {"hidden_size": 8, "auxiliary_channels": 8}
    with caplog.at_level("INFO"):
        run = train(
            str(tmp_path / "data"), "semantic-segmentation", runs=str(tmp_path / "runs"), batch_size=4,
            masks={"class_names": 2}, head=head, **options,
        )  # fmt: skip
    assert "augmentation.distort 0.5 is left out: it changes colours" in caplog.text
    assert AutoModelForSemanticSegmentation.from_pretrained(run.folder / "model").config.num_channels == 5
    model, processor = load_classifier(str(run.folder))
    path = str(tmp_path / "data" / "test" / "images" / "0.npy")
    ((source, shares),) = predict_masks(model, processor, [path], tmp_path / "masks")
    assert source == path and sum(share.score for share in shares) == pytest.approx(1)
    for name, width in (("0_mask.png", SHAPE[1]), ("0_overlay.png", SHAPE[1] + LEGEND_WIDTH)):
        with Pictures.open(tmp_path / "masks" / name) as written:
            assert written.width == width
    data = SegmentationDataModule(str(tmp_path / "data"), image_size=16, masks=Masks(class_names=2))
    np.save(tmp_path / "data" / "test" / "masks" / "0.npy", np.full(SHAPE, 0.5))
    with pytest.raises(UnreadablePictureError, match=r"0\.npy is an array of shape \(20, 24\) and type float64"):
        next(iter(data.test_dataloader()))


def test_prediction_says_what_is_wrong_with_a_file(tmp_path):
    torch.manual_seed(0)
    config = SwinHFConfig(
        image_size=16, num_channels=5, window_size=4, patch_size=2, num_labels=2, **NETWORK["overrides"]
    )
    model, processor = SwinHFForImageClassification(config).eval(), Preprocessing.of_release((16, 16), 5).processor()
    np.save(tmp_path / "few.npy", np.zeros((4, 4, 4)))
    np.save(tmp_path / "right.npy", np.zeros((4, 4, 5)))
    found = dict(predict(model, processor, [str(tmp_path / "few.npy"), str(tmp_path / "right.npy")]))
    error = found[str(tmp_path / "few.npy")]
    assert isinstance(error, PictureError)
    assert "it has 4 channels, and 5 are wanted (num_channels); open it in a viewer, or leave it out" in str(error)
    picture = read_picture(str(tmp_path / "right.npy"), 5, processor)
    assert classify(model, processor, [picture], top_k=2)[0] == found[str(tmp_path / "right.npy")]
