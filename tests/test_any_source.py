"""One kind of source everywhere: anyone's Swin, written by the library it belongs to, read by every function alike."""

import json
import os

import pytest
import torch
from checkpoint_peers import CLASSES, SQUARE, images, peer, timm_swin, transformers_swin
from hub_server import FOR_EVER, READER, STRANGER, WRITER, User
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

import swin_hf
from swin_hf import SwinHFBackbone, SwinHFForImageClassification, SwinHFModel, cli, load_backbone, load_checkpoint
from swin_hf.hub import HubError, remote
from swin_hf.hub.facts import TrainingFacts
from swin_hf.hub.model_card import CardSource, render_card
from swin_hf.loading import find_model
from swin_hf.predict import load_classifier
from swin_hf.training import SwinClassifier, SwinMaskedImageModeler, SwinSegmenter
from swin_hf.training.tasks.distillation import load_teacher
from swin_hf.training.tasks.masked_image_modeling import Masking

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the client's own
NAMES = [f"class {number}" for number in range(CLASSES)]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture
def hub(hub, monkeypatch):
    """The loopback Hub, which every client of this process talks to."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    return hub


def publish(folder, repo_id):
    api = HfApi(endpoint=constants.ENDPOINT)
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    return repo_id


def write_transformers(folder, hub, repo_id):
    model = transformers_swin("SwinForImageClassification")
    model.config.id2label = dict(enumerate(NAMES))
    model.config.label2id = {name: number for number, name in enumerate(NAMES)}
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=MEAN, image_std=STD, resample=3).save_pretrained(folder)
    return publish(folder, repo_id)


def write_transformers_4(folder, hub, repo_id):
    """The names and the buffers of 4.x, under the configuration that it wrote."""
    write_transformers(folder, hub, "user/scratch")
    save_file(peer("transformers-4 ForImageClassification").state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("dtype", "transformers_version")}
    (folder / "config.json").write_text(
        json.dumps(config | {"torch_dtype": "float32", "transformers_version": "4.30.0"})
    )
    old = {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", "resample": 3}
    old |= {"image_mean": MEAN, "image_std": STD, "size": 32}  # as microsoft/swin-tiny-patch4-window7-224 has it
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    return publish(folder, repo_id)


def write_timm(folder, hub, repo_id):
    from timm.models import push_to_hf_hub

    model = timm_swin()
    model.pretrained_cfg = {"architecture": "swin_tiny_patch4_window7_224", "input_size": (3, 32, 32), "mean": MEAN}
    model.pretrained_cfg |= {"std": STD, "interpolation": "bicubic", "crop_pct": 0.875, "num_classes": CLASSES}
    config = {"label_names": NAMES, "num_classes": CLASSES}
    push_to_hf_hub(model, repo_id, model_config=config, private=False, task_name="image-classification")
    return repo_id


def write_ours(folder, hub, repo_id):
    model = load_checkpoint(peer("timm").state)
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {n: i for i, n in enumerate(NAMES)}
    swin_hf.push(model, repo_id, endpoint=hub.url)
    return repo_id


def write_microsoft(folder, hub, repo_id):
    torch.save({"model": peer("microsoft").state, "epoch": 300}, folder / "swin_tiny_patch4_window7_224.pth")
    return f"hf://{publish(folder, repo_id)}/swin_tiny_patch4_window7_224.pth"


def write_openmmlab(folder, hub, repo_id):
    meta = {"dataset_meta": {"classes": NAMES}}
    torch.save({"state_dict": peer("openmmlab").state, "meta": meta}, folder / "swin_3rdparty.pth")
    return f"hf-hub:{publish(folder, repo_id)}/swin_3rdparty.pth"


def write_safetensors(folder, hub, repo_id):
    save_file(peer("torchvision").state, folder / "swin_t.safetensors")
    return publish(folder, repo_id)


WRITERS = [write_transformers, write_transformers_4, write_timm, write_ours, write_microsoft, write_openmmlab]
WRITERS += [write_safetensors]
PEERS = {
    "write_transformers": "transformers ForImageClassification",
    "write_transformers_4": "transformers-4 ForImageClassification",
    "write_safetensors": "torchvision",
}


@pytest.fixture(params=WRITERS, ids=lambda writer: writer.__name__.removeprefix("write_"))
def source(request, hub, tmp_path):
    """A repository on the Hub, and the logits that the library of its weights computes."""
    (tmp_path / "written").mkdir()
    source = request.param(tmp_path / "written", hub, "user/swin-tiny")
    theirs = peer(PEERS.get(request.param.__name__, "timm")).module
    with torch.no_grad():
        logits = theirs(images())
    return source, getattr(logits, "logits", logits)


def assert_equal(ours, theirs):
    """To 1e-5, of the largest logit where that is more than 1."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


def logits_of(model):
    with torch.no_grad():
        return model(images()).logits


def test_every_function_gives_the_same_answer(source, tmp_path, capsys):
    source, expected = source
    ours = SwinHFForImageClassification.from_pretrained(source)
    assert_equal(logits_of(ours), expected)
    assert_equal(logits_of(load_checkpoint(source)), expected)
    assert_equal(logits_of(load_classifier(source, device="cpu")[0]), expected)
    swin_hf.convert_checkpoint(source, tmp_path / "converted", to="swin_hf")
    converted = SwinHFForImageClassification.from_pretrained(tmp_path / "converted")
    assert_equal(logits_of(converted), expected)
    assert ours.config.name_or_path == source
    assert ours.config.to_dict() | {"_name_or_path": 0} == converted.config.to_dict() | {"_name_or_path": 0}
    config = swin_hf.SwinHFConfig.from_pretrained(source)
    unknown = {"_name_or_path": 0, "architectures": 0}  # a configuration of transformers alone does not name our class
    assert config.to_dict() | unknown == ours.config.to_dict() | unknown
    assert not ours.training and ours.config.shift_per_axis is converted.config.shift_per_axis

    base, backbone = SwinHFModel.from_pretrained(source), load_backbone(source, out_features=["stage1", "stage3"])
    assert torch.equal(base.norm.weight, ours.swin.norm.weight) and base.config.id2label == ours.config.id2label
    assert isinstance(backbone, SwinHFBackbone) and list(backbone.hidden_states_norms) == ["stage1", "stage3"]
    assert torch.equal(backbone.swin.stages[1].blocks[1].mlp.fc1.weight, ours.swin.stages[1].blocks[1].mlp.fc1.weight)


def check_verbs(source, tmp_path, capsys):
    """Every verb of the command line reads a source as ``load_checkpoint`` does."""
    ours = load_checkpoint(source)
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "a.png")
    capsys.readouterr()
    assert cli.main(["predict", source, str(tmp_path / "a.png"), "--json", "--device", "cpu"]) == 0
    label = json.loads(capsys.readouterr().out)[0]["predictions"][0]["label"]
    assert label in (ours.config.id2label.values())
    assert cli.main(["info", source, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["depths"] == ours.config.depths and facts["window"] == ours.config.window_size
    assert cli.main(["explain", source, str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), "--device", "cpu"]) == 0
    assert label in capsys.readouterr().out
    assert cli.main(["export", source, "--to", "torch", "--output", str(tmp_path / "c.pt2")]) == 0
    assert cli.main(["convert", source, str(tmp_path / "d"), "--to", "timm"]) == 0
    assert torch.equal(
        load_file(tmp_path / "d" / "model.safetensors")["patch_embed.norm.weight"], ours.swin.embeddings.norm.weight
    )


SOME = [write_timm, *(pytest.param(writer, marks=pytest.mark.slow) for writer in WRITERS if writer is not write_timm)]


@pytest.mark.parametrize(
    "source",
    SOME,
    ids=[w.__name__.removeprefix("write_") for w in [write_timm, *(w for w in WRITERS if w is not write_timm)]],
    indirect=True,
)
def test_every_verb_takes_it(source, tmp_path, capsys):
    check_verbs(source[0], tmp_path, capsys)


@pytest.mark.parametrize("source", [write_transformers, write_transformers_4, write_timm], indirect=True)
def test_names_and_image_processor_are_those_of_the_source(source, tmp_path):
    source, _expected = source
    model = SwinHFForImageClassification.from_pretrained(source)
    assert list(model.config.id2label.values()) == NAMES and model.config.image_size == 32
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(model.state_dict())
    auto = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert type(auto) is SwinHFForImageClassification and torch.equal(logits_of(auto), logits_of(model))
    swin_hf.convert_checkpoint(source, tmp_path / "converted", to="swin_hf")
    # 36 pixels high after resizing; where a margin of the crop is odd, timm rounds it up and transformers down.
    picture = Image.effect_mandelbrot((60, 45), (-2, -1.5, 1, 1.5), 90).convert("RGB")
    theirs = AutoImageProcessor.from_pretrained(source)(picture, return_tensors="pt")["pixel_values"]
    for folder in ("saved", "converted"):
        ours = AutoImageProcessor.from_pretrained(tmp_path / folder)(picture, return_tensors="pt")["pixel_values"]
        # timm resamples 8-bit pictures with PIL, torchvision tensors: a step of 1/255 apart.
        step = 1 / 255 / min(STD) * 1.01 if "transform" not in str(type(theirs)) else 0
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=0, atol=step)


@pytest.mark.parametrize("source", [write_transformers, write_microsoft, write_safetensors], indirect=True)
def test_offline_the_cache_answers(source, hub, monkeypatch):
    source, expected = source
    assert find_model(source).repo_id == "user/swin-tiny" and len(find_model(source).commit) == 40
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert_equal(logits_of(SwinHFForImageClassification.from_pretrained(source)), expected)
    assert_equal(logits_of(load_checkpoint(source)), expected)
    with pytest.raises(OSError, match="the cache does not hold user/other"):
        SwinHFForImageClassification.from_pretrained("user/other")
    assert hub.requests == []
    monkeypatch.undo()
    close_session()


def test_every_training_starts_from_it(source):
    source, _ = source
    ours = load_checkpoint(source)
    started = [SwinClassifier(weights=source, num_labels=3), SwinSegmenter(weights=source, num_labels=3)]
    started.append(SwinMaskedImageModeler(weights=source, masking=Masking(cell=16)))
    for module in started:
        table = module.model.swin.stages[1].blocks[1].attention.relative_position_bias_table
        assert torch.equal(table, ours.swin.stages[1].blocks[1].attention.relative_position_bias_table)
        assert module.origin == find_model(source) and module.origin.repo_id == "user/swin-tiny"
    assert module(images(), module.draw_masks(images())).loss.isfinite()
    assert len(load_teacher(source, dict(enumerate(ours.config.id2label.values())), 3).network.config.id2label) == 5


def test_pretraining_goes_on_with_the_decoder_of_another_library(hub, tmp_path):
    theirs = transformers_swin("SwinForMaskedImageModeling")
    theirs.save_pretrained(tmp_path / "written")
    module = SwinMaskedImageModeler(weights=publish(tmp_path / "written", "user/simmim"), masking=Masking(cell=16))
    mask = module.draw_masks(images())
    with torch.no_grad():
        expected = theirs(images(), bool_masked_pos=mask.flatten(1)).reconstruction
        assert_equal(module(images(), mask).reconstruction, expected)


@pytest.mark.parametrize("given", [None, "apache-2.0"])
@pytest.mark.parametrize("start", [None, "mit"])
def test_a_card_has_the_licence_of_the_start(given, start):
    facts = TrainingFacts(base_model="user/start", base_model_revision="0123456", base_model_license=start)
    config = swin_hf.SwinHFConfig(**SQUARE)
    card = render_card(CardSource(config, "SwinHFForImageClassification", {}, facts, license=given))
    known = given or start
    assert (f"\nlicense: {known}\n" in card) if known else ("\nlicense:" not in card)
    assert "base_model: user/start" in card and "0123456" in card
    said = f"Weights: `{known}`" if known else "Weights: unknown. They started from `user/start`, whose licence was not"
    assert said in card


# ------------------------------------------------------------------------------------------------- ids and addresses


def test_ways_to_write_an_id(hub, tmp_path):
    from swin_hf.checkpoints import open_checkpoint

    (tmp_path / "written").mkdir()
    hub.users[WRITER] = User("user", "write", ("timm",))
    write_timm(tmp_path / "written", hub, "timm/swin_tiny.ms_in1k")
    first = find_model("timm/swin_tiny.ms_in1k").commit
    HfApi(endpoint=hub.url).create_tag("timm/swin_tiny.ms_in1k", tag="v1")
    hub.put("timm/swin_tiny.ms_in1k", {"README.md": b"---\nlicense: mit\n---\n"})
    second = find_model("timm/swin_tiny.ms_in1k")
    assert second.commit != first and second.license == "mit"
    for written in (
        "timm/swin_tiny.ms_in1k@v1",
        f"hf-hub:timm/swin_tiny.ms_in1k@{first}",
        "hf_hub:timm/swin_tiny.ms_in1k@v1",
    ):
        assert find_model(written).commit == first
        assert open_checkpoint(find_model(written).path).place.layout.name == "timm"
    assert find_model("timm/swin_tiny.ms_in1k", "v1").commit == first
    assert find_model("hf://timm/swin_tiny.ms_in1k/model.safetensors").path == second.path
    ours = SwinHFForImageClassification.from_pretrained("timm/swin_tiny.ms_in1k", revision="v1")
    again = SwinHFForImageClassification.from_pretrained("timm/swin_tiny.ms_in1k@v1")
    assert torch.equal(logits_of(ours), logits_of(again))
    with pytest.raises(ValueError, match="names the revision 'v1', and 'main' was given too"):
        find_model("timm/swin_tiny.ms_in1k@v1", "main")


@pytest.mark.parametrize("name", ["microsoft", "timm", "torchvision", "transformers ForImageClassification"])
@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_the_type_of_anyones_weights_can_be_kept(name, kept, tmp_path):
    weights = {key: t.to(getattr(torch, kept)) if t.is_floating_point() else t for key, t in peer(name).state.items()}
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / "model.safetensors")
    for option in ({}, {"dtype": "auto"}, {"torch_dtype": "auto"}):
        model = SwinHFForImageClassification.from_pretrained(tmp_path / "model.safetensors", **option)
        assert model.dtype == getattr(torch, kept)
    assert SwinHFForImageClassification.from_pretrained(tmp_path, dtype="float64").dtype == torch.float64


def test_sizes_labels_types_and_fields_are_changed_on_the_way(hub, tmp_path):
    (tmp_path / "written").mkdir()
    source = write_transformers(tmp_path / "written", hub, "user/swin-tiny")
    model, info = SwinHFForImageClassification.from_pretrained(
        source,
        num_labels=3,
        ignore_mismatched_sizes=True,
        drop_path_rate=0.3,
        image_size=48,
        window_size=6,
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    assert model.config.drop_path_rate == 0.3 and model.config.num_labels == 3 and model.dtype == torch.bfloat16
    assert model.config.stage_windows[0] == (6, 6) and model.config.image_hw == (48, 48)
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "preprocessor_config.json").exists()  # it was for another image size
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        SwinHFForImageClassification.from_pretrained(source, num_labels=3)
    config = swin_hf.SwinHFConfig(**{**SQUARE, "window_size": 6})
    resized = SwinHFForImageClassification.from_pretrained(source, config=config)
    assert torch.equal(
        logits_of(resized), logits_of(SwinHFForImageClassification.from_pretrained(source, window_size=6))
    )


def test_private_repository_needs_its_token(hub, tmp_path, monkeypatch):
    (tmp_path / "written").mkdir()
    source = write_transformers(tmp_path / "written", hub, "user/secret")
    hub.repos["user/secret"].private = True
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    for load in (SwinHFForImageClassification.from_pretrained, load_checkpoint, load_backbone):
        with pytest.raises((OSError, HubError), match=r"there is no repository user/secret that can be seen .* log in"):
            load(source)
    assert not list((tmp_path / "hf_cache").rglob("*.safetensors"))
    SwinHFForImageClassification.from_pretrained(source, token=READER)
    monkeypatch.setenv("HF_TOKEN", READER)
    load_checkpoint(source)


# ---------------------------------------------------------------------------------------------------------- bad input


def without_weights(folder, hub):
    write_transformers(folder, hub, "user/scratch")
    (folder / "model.safetensors").unlink()


def only_pickles(folder, hub):
    without_weights(folder, hub)
    torch.save(peer("transformers ForImageClassification").state, folder / "pytorch_model.bin")


def two_files(folder, hub):
    for name in ("one.safetensors", "two.safetensors"):
        save_file(peer("timm").state, folder / name)


def of_transformers(name, **sizes):
    def write(folder, hub):
        import transformers

        config = getattr(transformers, f"{name}Config")(**sizes)
        getattr(transformers, f"{name}ForImageClassification")(config).save_pretrained(folder)

    return write


def of_timm(name, **sizes):
    def write(folder, hub):
        import timm

        timm.models.save_for_hf(timm.create_model(name, **sizes), folder, safe_serialization=True)

    return write


def contradiction(folder, hub):
    write_transformers(folder, hub, "user/scratch")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"embed_dim": 16}))


VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CONVNEXT = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
V2 = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
TINY = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
TIMM_V2 = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "img_size": 64, "window_size": 8}
BAD = {
    "no weights": (without_weights, "user/bad holds no model.safetensors"),
    "pickles": (
        only_pickles,
        "pickled weights only .pytorch_model.bin.*or name the file .* hf://user/bad/pytorch_model",
    ),
    "two files": (two_files, "holds 2 files of weights .one.safetensors, two.safetensors.; name one of them: hf://"),
    "ViT": (of_transformers("ViT", **VIT), "user/bad is not a Swin Transformer .*says vit; known are model_type swin,"),
    "ConvNeXt": (of_transformers("ConvNext", **CONVNEXT), "is not a Swin Transformer .*says convnext"),
    "timm's V2-CR": (
        of_timm("swinv2_cr_tiny_224", **TIMM_V2),
        r"says swinv2_cr of timm; .* timm's swin_\*, swin_s3_\* and swinv2_\*",
    ),
    "timm's ResNet": (of_timm("resnet10t"), "says resnet10t"),
    "contradiction": (contradiction, "config.json contradicts the weights: embed_dim is 16 there but 8 in the weights"),
}


@pytest.mark.parametrize(("write", "message"), BAD.values(), ids=BAD)
def test_bad_repository_is_a_sentence_and_leaves_nothing(write, message, hub, tmp_path, capsys):
    (tmp_path / "written").mkdir()
    write(tmp_path / "written", hub)
    publish(tmp_path / "written", "user/bad")
    hub.requests.clear()
    calls = [SwinHFForImageClassification.from_pretrained, load_checkpoint, load_backbone, load_classifier]
    calls.append(lambda source: swin_hf.convert_checkpoint(source, tmp_path / "out", to="timm"))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call("user/bad")
    assert cli.main(["convert", "user/bad", str(tmp_path / "out"), "--to", "swin_hf"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("swin-hf convert: ") and not (tmp_path / "out").exists()
    if write is not contradiction:  # whose weights had to be read
        cached = [path for path in (tmp_path / "hf_cache").rglob("*") if path.suffix in (".safetensors", ".bin")]
        assert not cached and "cdn" not in hub.steps()


def test_the_other_version_is_loaded_where_no_class_is_named_and_refused_where_it_is(hub, tmp_path):
    (tmp_path / "written").mkdir()
    of_transformers("Swinv2", **V2)(tmp_path / "written", hub)
    publish(tmp_path / "written", "user/v2")
    for call in (load_checkpoint, load_backbone, lambda source: load_classifier(source)[0]):
        assert type(call("user/v2")).__name__.startswith("SwinV2HF")
    with pytest.raises(ValueError, match=r"Swin Transformer V2 and SwinHF\w+ is Swin Transformer V1; use SwinV2HF"):
        SwinHFForImageClassification.from_pretrained("user/v2")


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_configuration_of_v2(hub, tmp_path, library):
    write = of_transformers("Swinv2", **V2) if library == "transformers" else of_timm("swinv2_tiny_window8_256", **TINY)
    write(tmp_path / "written", hub)
    publish(tmp_path / "written", "user/v2")
    config = swin_hf.SwinV2HFConfig.from_pretrained("user/v2", drop_path_rate=0.3)
    assert any("safetensors" in path for _, path, _ in hub.requests) == (library == "timm")  # only it needs the weights
    model = swin_hf.SwinV2HFForImageClassification.from_pretrained("user/v2", drop_path_rate=0.3)
    unknown = {"_name_or_path": 0, "architectures": 0}
    assert config.to_dict() | unknown == model.config.to_dict() | unknown
    assert (config.drop_path_rate == 0.3 and config.stage_windows == ((4, 4), (4, 4))) or library == "timm"
    with pytest.raises(ValueError, match=r"of model type 'swinv2(_hf)?' .* use the classes that begin with SwinV2HF"):
        swin_hf.SwinHFConfig.from_pretrained("user/v2")
    config.save_pretrained(tmp_path / "ours")
    assert swin_hf.SwinV2HFConfig.from_pretrained(tmp_path / "ours").to_dict() == config.to_dict()


def test_configuration_of_a_configuration_alone(tmp_path):
    transformers_swin("SwinForImageClassification").config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        assert swin_hf.SwinHFConfig.from_pretrained(source).depths == SQUARE["depths"]
    (tmp_path / "config.json").write_text('{"architecture": "swin_tiny_patch4_window7_224"}')
    with pytest.raises(ValueError, match="a folder needs one file of weights"):
        swin_hf.SwinHFConfig.from_pretrained(tmp_path)


def test_pickle_that_is_asked_for_is_read_without_code(hub, tmp_path):
    (tmp_path / "written").mkdir()
    only_pickles(tmp_path / "written", hub)
    publish(tmp_path / "written", "user/pickles")
    expected = logits_of(transformers_swin("SwinForImageClassification"))
    asked = SwinHFForImageClassification.from_pretrained("user/pickles", use_safetensors=False)
    assert_equal(logits_of(asked), expected)
    named = load_checkpoint("hf://user/pickles/pytorch_model.bin")
    assert_equal(logits_of(named), expected)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it-ran"),)

    torch.save({"state_dict": peer("microsoft").state, "meta": Evil()}, tmp_path / "written" / "pytorch_model.bin")
    publish(tmp_path / "written", "user/pickles")
    for call in (load_checkpoint, SwinHFForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=r"holds code or objects .*nothing of it was executed"):
            call("hf://user/pickles/pytorch_model.bin")
    assert not (tmp_path / "it-ran").exists()


def test_missing_gated_and_broken_downloads(hub, tmp_path, monkeypatch):
    for call in (SwinHFForImageClassification.from_pretrained, load_checkpoint, load_backbone):
        with pytest.raises((OSError, HubError), match="there is no repository user/nowhere that can be seen from here"):
            call("user/nowhere")
    (tmp_path / "written").mkdir()
    source = write_transformers(tmp_path / "written", hub, "user/swin-tiny")
    hub.fail("cdn", "half", times=FOR_EVER)
    with pytest.raises(OSError, match=r"cannot be reached or broke off|did not arrive"):
        SwinHFForImageClassification.from_pretrained(source)
    assert not [path for path in (tmp_path / "hf_cache").rglob("*.safetensors") if path.exists()]
    hub.faults.clear()
    hub.fail("cdn", "corrupt", times=FOR_EVER)
    with pytest.raises(OSError, match="did not arrive as the Hub has it, twice, and was removed"):
        SwinHFForImageClassification.from_pretrained(source)
    assert not [path for path in (tmp_path / "hf_cache").rglob("*.safetensors") if path.exists()]
    hub.faults.clear()
    hub.repos["user/swin-tiny"].gated = True
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with pytest.raises(OSError, match="access to user/swin-tiny is restricted; ask for it"):
        SwinHFForImageClassification.from_pretrained(source)


def test_swin_s3_of_timm_is_read(hub, tmp_path):
    import timm
    from timm.models import push_to_hf_hub

    sizes = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 2), "num_classes": 4}
    theirs = timm.create_model("swin_s3_tiny_224", **sizes).eval()  # windows of 7, 7, 14 and 7 tokens
    push_to_hf_hub(theirs, "user/swin_s3", private=False)
    ours = SwinHFForImageClassification.from_pretrained("user/swin_s3")
    assert ours.config.stage_windows == ((7, 7), (7, 7), (14, 14), (7, 7))
    pixels = images(224, 224)
    with torch.no_grad():
        assert_equal(ours(pixels).logits, theirs(pixels))


# --------------------------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize("naming", ["transformers", "transformers-4", "transformers-memory"])
def test_transformers_means_any_of_its_namings(naming, tmp_path):
    state = peer(f"{naming} ForImageClassification").state
    expected = logits_of(transformers_swin("SwinForImageClassification"))
    assert_equal(logits_of(load_checkpoint(state, layout="transformers")), expected)
    save_file(state, tmp_path / "x.safetensors")
    assert_equal(logits_of(load_checkpoint(tmp_path / "x.safetensors", "transformers")), expected)


def test_layouts_that_a_user_can_say_are_listed():
    for name, naming in {"transformers": "maskformer-swin", "timm": "timm-old", "microsoft": "timm-old"}.items():
        load_checkpoint(peer(naming).state, name, model_class=SwinHFBackbone)
    said = "swin_hf, microsoft, timm, torchvision, transformers, openmmlab"
    with pytest.raises(ValueError, match=f"unknown layout 'huggingface'; choose one of {said}$"):
        load_checkpoint(peer("timm").state, layout="huggingface")
    with pytest.raises(ValueError, match=f"this is not a Swin Transformer: .*; its layouts are {said}$"):
        load_checkpoint({"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="the keys are those of the timm layout, not microsoft; leave layout= out"):
        load_checkpoint(peer("timm").state, layout="microsoft")
