"""One kind of source everywhere, for Swin V2: written by the library it belongs to, read by every function alike."""

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from test_any_source import assert_equal, check_verbs, hub, publish  # noqa: F401 - a fixture

import swin_hf
from swin_hf import SwinV2HFBackbone, SwinV2HFForImageClassification, SwinV2HFModel, load_backbone, load_checkpoint
from swin_hf.loading import find_model
from swin_hf.predict import load_classifier
from swin_hf.training import SwinClassifier, SwinMaskedImageModeler, SwinSegmenter
from swin_hf.training.tasks.distillation import load_teacher

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the Hub client's own
NAMES = ["ash", "elm", "fir", "oak", "yew"]
SIDE = 64  # pixels
CONFIG = swin_hf.SwinV2HFConfig(
    embed_dim=16,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=8,
    image_size=SIDE,
    num_labels=len(NAMES),
    encoder_stride=8,
)


def pictures():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def random_weights(module):
    """All weights, also those that start as 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def write_transformers(folder):
    from transformers import Swinv2Config, Swinv2ForImageClassification, ViTImageProcessor

    sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": SIDE}
    config = Swinv2Config(**sizes, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    theirs = random_weights(Swinv2ForImageClassification(config))
    theirs.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return "user/v2", theirs


def timm_v2():
    import timm

    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 8, "img_size": SIDE}
    return random_weights(timm.create_model("swinv2_tiny_window8_256", num_classes=len(NAMES), **sizes))


def write_timm(folder):
    import timm

    theirs = timm_v2()
    theirs.pretrained_cfg = {"architecture": "swinv2_tiny_window8_256", "input_size": (3, SIDE, SIDE)}
    config = {"label_names": NAMES, "num_classes": len(NAMES)}
    timm.models.save_for_hf(theirs, folder, model_config=config, safe_serialization=True)
    return "hf-hub:user/v2", theirs


def write_microsoft(folder):
    """The names of Microsoft, written by us; timm computes the logits."""
    theirs = timm_v2()
    model = load_checkpoint(theirs.state_dict(), config=CONFIG)
    torch.save({"model": swin_hf.export_checkpoint(model, "microsoft")}, folder / "swinv2_tiny_patch4_window8_256.pth")
    return "hf://user/v2/swinv2_tiny_patch4_window8_256.pth", theirs


def write_ours(folder):
    theirs = timm_v2()
    model = load_checkpoint(theirs.state_dict(), config=CONFIG)
    model.config.id2label, model.config.label2id = dict(enumerate(NAMES)), {n: i for i, n in enumerate(NAMES)}
    model.save_pretrained(folder)
    return "user/v2@main", theirs


WRITERS = [write_transformers, write_timm, write_microsoft, write_ours]


@pytest.fixture(params=WRITERS, ids=lambda writer: writer.__name__.removeprefix("write_"))
def source(request, hub, tmp_path):  # noqa: F811 - the fixture
    """A repository on the Hub, and the logits that the library of its weights computes."""
    (tmp_path / "written").mkdir()
    source, theirs = request.param(tmp_path / "written")
    publish(tmp_path / "written", "user/v2")
    with torch.no_grad():
        logits = theirs(pictures())
    return source, getattr(logits, "logits", logits)


def logits_of(model):
    with torch.no_grad():
        return model(pictures()).logits


def test_every_function_gives_the_same_answer_of_v2(source, tmp_path):
    source, expected = source
    ours = SwinV2HFForImageClassification.from_pretrained(source)
    assert_equal(logits_of(ours), expected)
    assert_equal(logits_of(load_checkpoint(source)), expected)
    assert_equal(logits_of(load_classifier(source, device="cpu")[0]), expected)
    swin_hf.convert_checkpoint(source, tmp_path / "converted", to="swin_hf")
    assert_equal(logits_of(SwinV2HFForImageClassification.from_pretrained(tmp_path / "converted")), expected)
    unknown = {"_name_or_path": 0, "architectures": 0}
    assert swin_hf.SwinV2HFConfig.from_pretrained(source).to_dict() | unknown == ours.config.to_dict() | unknown
    if not source.endswith(".pth"):
        assert list(ours.config.id2label.values()) == NAMES

    base, backbone = SwinV2HFModel.from_pretrained(source), load_backbone(source, out_features=["stage2"])
    assert torch.equal(base.norm.weight, ours.swin.norm.weight) and isinstance(backbone, SwinV2HFBackbone)
    assert torch.equal(backbone.swin.stages[1].blocks[1].mlp.fc1.weight, ours.swin.stages[1].blocks[1].mlp.fc1.weight)


def test_every_training_starts_from_v2(source):
    source, _ = source
    ours = load_checkpoint(source)
    started = [SwinClassifier(weights=source, num_labels=3), SwinSegmenter(weights=source, num_labels=3)]
    started.append(SwinMaskedImageModeler(weights=source))
    for module in started:
        layer, wanted = module.model.swin.stages[1].blocks[1].attention, ours.swin.stages[1].blocks[1].attention
        assert torch.equal(layer.logit_scale, wanted.logit_scale) and torch.equal(layer.qkv.weight, wanted.qkv.weight)
        assert module.origin == find_model(source) and module.origin.repo_id == "user/v2"
    assert module(pictures(), module.draw_masks(pictures())).loss.isfinite()
    assert len(load_teacher(source, dict(enumerate(ours.config.id2label.values())), 3).network.config.id2label) == 5


@pytest.mark.parametrize(
    "source",
    [write_timm, *(pytest.param(writer, marks=pytest.mark.slow) for writer in WRITERS if writer is not write_timm)],
    indirect=True,
)
def test_every_verb_takes_v2(source, tmp_path, capsys):
    check_verbs(source[0], tmp_path, capsys)


def test_offline_the_cache_answers_for_v2(source, hub, monkeypatch):  # noqa: F811 - the fixture
    source, expected = source
    find_model(source)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert_equal(logits_of(SwinV2HFForImageClassification.from_pretrained(source)), expected)
    assert hub.requests == []
    monkeypatch.undo()
    close_session()
