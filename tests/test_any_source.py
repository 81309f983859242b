"""One kind of source everywhere: anyone's Swin, written by the library it belongs to, read by every function alike."""

import json

import pytest
import torch
from checkpoint_peers import CLASSES, images, peer, timm_swin, transformers_swin
from conftest import PARITY
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

import swin_hf
from swin_hf import SwinHFBackbone, SwinHFForImageClassification, SwinHFModel, cli, load_backbone, load_checkpoint
from swin_hf.hub import remote
from swin_hf.loading import find_model
from swin_hf.predict import load_classifier

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


def logits_of(model):
    with torch.no_grad():
        return model(images()).logits


def test_every_function_gives_the_same_answer(source, tmp_path, capsys):
    source, expected = source
    ours = SwinHFForImageClassification.from_pretrained(source)
    torch.testing.assert_close(logits_of(ours), expected, **PARITY)
    torch.testing.assert_close(logits_of(load_checkpoint(source)), expected, **PARITY)
    torch.testing.assert_close(logits_of(load_classifier(source, device="cpu")[0]), expected, **PARITY)
    swin_hf.convert_checkpoint(source, tmp_path / "converted", to="swin_hf")
    converted = SwinHFForImageClassification.from_pretrained(tmp_path / "converted")
    torch.testing.assert_close(logits_of(converted), expected, **PARITY)
    assert ours.config.name_or_path == source
    assert ours.config.to_dict() | {"_name_or_path": 0} == converted.config.to_dict() | {"_name_or_path": 0}
    assert not ours.training and ours.config.shift_per_axis is converted.config.shift_per_axis

    base, backbone = SwinHFModel.from_pretrained(source), load_backbone(source, out_features=["stage1", "stage3"])
    assert torch.equal(base.norm.weight, ours.swin.norm.weight) and base.config.id2label == ours.config.id2label
    assert isinstance(backbone, SwinHFBackbone) and list(backbone.hidden_states_norms) == ["stage1", "stage3"]
    assert torch.equal(backbone.swin.stages[1].blocks[1].mlp.fc1.weight, ours.swin.stages[1].blocks[1].mlp.fc1.weight)


SOME = [write_timm, *(pytest.param(writer, marks=pytest.mark.slow) for writer in WRITERS if writer is not write_timm)]


@pytest.mark.parametrize(
    "source",
    SOME,
    ids=[w.__name__.removeprefix("write_") for w in [write_timm, *(w for w in WRITERS if w is not write_timm)]],
    indirect=True,
)
def test_every_verb_takes_it(source, tmp_path, capsys):
    source, _ = source
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
    torch.testing.assert_close(logits_of(SwinHFForImageClassification.from_pretrained(source)), expected, **PARITY)
    torch.testing.assert_close(logits_of(load_checkpoint(source)), expected, **PARITY)
    with pytest.raises(OSError, match="the cache does not hold user/other"):
        SwinHFForImageClassification.from_pretrained("user/other")
    assert hub.requests == []
    monkeypatch.undo()
    close_session()
