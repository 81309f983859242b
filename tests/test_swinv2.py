"""Swin V2 in every room of the house: pushed, pulled, found, classified with, explained, exported, adapted, trained."""

import copy

import pytest
import torch
from checkpoint_peers import images
from conftest import PARITY
from PIL import Image
from transformers import pipeline

import swin_hf
from swin_hf import SwinV2HFBackbone, SwinV2HFConfig, SwinV2HFForImageClassification
from swin_hf.export import load_engine, sample_images
from swin_hf.families import FAMILIES
from swin_hf.training.optim import is_decayed, layer_id

TINY = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (1, 2, 1),
    "num_heads": (2, 2, 4),
    "window_size": 4,
    "encoder_stride": 8,
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # the client's own
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # peft's call
]


@pytest.fixture(scope="module")
def built() -> SwinV2HFForImageClassification:
    """A classifier with all that V2 has; its branches matter, whose norms start at zero."""
    torch.manual_seed(0)
    names = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    own = {"pretrained_window_sizes": (3, 3, 3), "extra_norm_every_n_blocks": 2}
    model = SwinV2HFForImageClassification(SwinV2HFConfig(**TINY, **names, **own)).eval()
    assert "swin.stages.1.blocks.1.norm3.weight" in model.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif parameter.ndim > 1 and "logit_scale" not in name:
                parameter.mul_(5)
    return model


@pytest.fixture
def model(built) -> SwinV2HFForImageClassification:
    return copy.deepcopy(built)


def test_it_goes_to_the_hub_and_back(hub, model, tmp_path):
    swin_hf.push(model, "user/v2", tag="v1", endpoint=hub.url)
    files = {path.name for path in FAMILIES["swinv2_hf"].travelling_files("image-classification")}
    assert files <= set(hub.files("user/v2")) and "modeling_swin_hf.py" in files
    card = hub.files("user/v2")["README.md"].decode()
    assert "Swin Transformer V2" in card and "2111.09883" in card
    assert "SwinV2HFForImageClassification" in card and "[3, 3, 3]" in card
    pulled = swin_hf.pull("user/v2", endpoint=hub.url)
    again = SwinV2HFForImageClassification.from_pretrained(pulled.path, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(again(images()).logits, model(images()).logits, **PARITY)
    v1 = swin_hf.SwinHFModel(swin_hf.SwinHFConfig(**TINY))
    swin_hf.push(v1, "user/v1", endpoint=hub.url)
    assert not [name for name in hub.files("user/v1") if "swinv2" in name]


def test_predicting_and_the_pipeline_agree(model, tmp_path):
    from swin_hf.predict import classify, load_classifier

    model.save_pretrained(tmp_path / "model")
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    loaded, processor = load_classifier(str(tmp_path / "model"))
    assert type(loaded) is SwinV2HFForImageClassification
    processor.save_pretrained(tmp_path / "model")
    (guesses,) = classify(loaded, processor, [picture], top_k=3)
    answers = pipeline("image-classification", model=str(tmp_path / "model"), top_k=3)(picture)
    assert [guess.label for guess in guesses] == [answer["label"] for answer in answers]
    for guess, answer in zip(guesses, answers, strict=True):
        assert guess.score == pytest.approx(answer["score"], abs=1e-4)


def test_backbone_of_a_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    backbone = swin_hf.load_backbone(tmp_path, out_features=["stage1", "stage3"])
    assert type(backbone) is SwinV2HFBackbone
    assert [tuple(x.shape) for x in backbone(images()).feature_maps] == [(2, 16, 16, 16), (2, 64, 4, 4)]


def test_explanations_see_every_block(model):
    maps = swin_hf.attention_maps(model, images())
    assert [(entry.stage, entry.block) for entry in maps] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    for entry in maps:
        torch.testing.assert_close(entry.weights.sum(-1), torch.ones_like(entry.weights[..., 0]))
    cam = swin_hf.grad_cam(model, images())
    assert cam.shape == (2, 32, 32) and cam.max() == 1 and cam.min() == 0


def test_adapters_train_and_merge(model):
    from peft import LoraConfig, get_peft_model

    with torch.no_grad():
        before = model(images()).logits
    config = LoraConfig(target_modules="all-linear", r=2, modules_to_save=["classifier"])
    adapted = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        torch.testing.assert_close(adapted(images()).logits, before, **PARITY)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    for _ in range(2):
        adapted(images(), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    trained = {name: x for name, x in adapted.named_parameters() if x.requires_grad and x.grad.abs().sum()}
    assert any("qkv.lora_B" in name for name in trained) and any("cpb_mlp.0.lora_B" in name for name in trained)
    adapted.eval()
    with torch.no_grad():
        expected = adapted(images()).logits
        assert not torch.allclose(expected, before, atol=1e-3)
        torch.testing.assert_close(adapted.merge_and_unload()(images()).logits, expected, **PARITY)


def test_weight_decay_leaves_the_coordinate_network_and_the_scales_alone(model):
    for name, parameter in model.named_parameters():
        expected = parameter.ndim > 1 and not any(part in name for part in ("cpb_mlp", "logit_scale"))
        assert is_decayed(f"model.{name}", parameter, model.undecayed) == expected, name
    assert layer_id("swin.stages.1.blocks.1.attention.cpb_mlp.0.weight", model.config.depths) == 3
    assert layer_id("swin.stages.1.blocks.1.attention.logit_scale", model.config.depths) == 3
    assert layer_id("swin.stages.1.blocks.1.norm3.weight", model.config.depths) == 3


@pytest.mark.slow
def test_exports_fold_the_bias(model, tmp_path):
    import onnx

    report = swin_hf.export_onnx(model, tmp_path / "v2.onnx")
    assert report.largest_difference < 1e-4
    names = {node.op_type for node in onnx.load(str(tmp_path / "v2.onnx")).graph.node}
    assert "Sigmoid" not in names  # the bias is a constant
    assert swin_hf.export_openvino(model, tmp_path / "v2.xml").largest_difference < 1e-4
    assert swin_hf.export_torch(model, tmp_path / "v2.pt2").largest_difference < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8_files_tell_pictures_apart_as_the_model_does(to, model, tmp_path):
    pictures = sample_images((32, 32))
    if to == "onnx":
        report = swin_hf.export_onnx(model, tmp_path / "v2.onnx", int8=True)
    else:
        report = swin_hf.export_openvino(model, tmp_path / "v2.xml", calibration=[pictures[:4], pictures[4:]])
    answers = load_engine(report.path)(pictures)
    with torch.no_grad():
        expected = model(pictures).logits
    difference = (answers - expected).abs().max()
    assert 0 < difference < 0.2 * expected.std() + 0.05  # equal would mean that nothing was quantised
    assert report.correlation > 0.95


def test_bias_of_a_trained_network_is_not_stale_in_validation(model):
    """Evaluation keeps what the coordinate network gave; a step of training in between must be seen."""
    with torch.no_grad():
        before = model(images()).logits
    optimizer = torch.optim.SGD(
        [parameter for name, parameter in model.named_parameters() if "cpb_mlp" in name], lr=1.0
    )
    model.train()(images(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(images()).logits
        fresh = copy.deepcopy(model)(images()).logits
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, fresh)
