"""timm's verbs on our classifier give what timm gives."""

import pytest
import timm
import torch
from conftest import PARITY
from timm.models import group_parameters
from timm.optim import create_optimizer_v2

from swin_hf import (
    SwinHFConfig,
    SwinHFForImageClassification,
    SwinV2HFConfig,
    SwinV2HFForImageClassification,
    load_checkpoint,
)
from swin_hf.training.optim import parameter_groups


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    sizes = {"img_size": (64, 96), "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=5, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture
def ours(theirs):
    return load_checkpoint(theirs.state_dict(), image_size=(64, 96)).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_features_and_head_are_timms(ours, theirs, images):
    features = ours.forward_features(images)
    assert features.shape == (2, 8, 12, 32)
    torch.testing.assert_close(features, theirs.forward_features(images), **PARITY)
    for pre_logits in (False, True):
        torch.testing.assert_close(
            ours.forward_head(features, pre_logits=pre_logits),
            theirs.forward_head(theirs.forward_features(images), pre_logits=pre_logits),
            **PARITY,
        )
    torch.testing.assert_close(ours.forward_head(features), ours(images).logits, rtol=0, atol=0)


def test_classifier_is_timms(ours, theirs):
    torch.testing.assert_close(ours.get_classifier().weight, theirs.get_classifier().weight, rtol=0, atol=0)
    torch.testing.assert_close(ours.get_classifier().bias, theirs.get_classifier().bias, rtol=0, atol=0)


@pytest.mark.parametrize("num_classes", [7, 5, 0])
def test_a_reset_classifier_is_new_and_of_that_size(num_classes, ours, theirs, images, tmp_path):
    for model in (ours, theirs):
        model.reset_classifier(num_classes)
    assert type(ours.get_classifier()) is type(theirs.get_classifier())
    with torch.no_grad():
        assert ours(images).logits.shape == theirs(images).shape
        if num_classes == 0:
            torch.testing.assert_close(ours(images).logits, theirs(images), **PARITY)
    assert ours.config.num_labels == ours.num_labels == len(ours.config.id2label) == num_classes
    ours.save_pretrained(tmp_path)
    again = SwinHFForImageClassification.from_pretrained(tmp_path, strict=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, ours(images).logits)


def test_a_reset_classifier_starts_as_that_of_a_new_model(ours, images):
    ours.to(torch.bfloat16).requires_grad_(False)
    ours.config.id2label = {number: f"name {number}" for number in range(5)}
    ours.reset_classifier(1000)
    head = ours.get_classifier()
    assert head.weight.dtype == torch.bfloat16 and head.weight.requires_grad and not head.bias.any()
    assert head.weight.float().std().item() == pytest.approx(ours.config.initializer_range, rel=0.05)
    assert ours.config.id2label[0] == "LABEL_0" and ours.config.label2id["LABEL_999"] == 999
    ours.config.id2label = dict.fromkeys(range(1000), "old")
    ours.reset_classifier(1000)
    head = ours.get_classifier()
    assert ours.config.id2label[999] == "LABEL_999" and not head.training
    ours.float()(images, labels=torch.tensor([1, 999])).loss.backward()
    assert head.weight.grad.any()


def test_a_negative_number_of_classes_is_refused(tiny_model):
    with pytest.raises(ValueError, match="num_classes is -1; give the number of classes, or 0 for none"):
        tiny_model.reset_classifier(-1)


@pytest.mark.parametrize("version", [1, 2])
def test_timms_optimisers_have_the_rates_and_decays_of_our_training(version):
    sizes = {"embed_dim": 16, "depths": (2, 1, 2), "num_heads": (1, 2, 4), "image_size": 32, "window_size": 4}
    if version == 1:
        model = SwinHFForImageClassification(SwinHFConfig(**sizes, use_absolute_embeddings=True))
    else:
        model = SwinV2HFForImageClassification(SwinV2HFConfig(**sizes))
    wanted = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, 1.0, 0.05, layer_decay=0.8)
        for parameter in group["params"]
    }
    theirs = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.8)
    found = {
        id(parameter): (group["lr"] * group["lr_scale"], group["weight_decay"])
        for group in theirs.param_groups
        for parameter in group["params"]
    }
    assert len({rate for rate, _ in wanted.values()}) == 7
    assert found.keys() == wanted.keys()
    for name, parameter in model.named_parameters():
        assert found[id(parameter)] == pytest.approx(wanted[id(parameter)]), name
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    assert len(set(coarse)) == 5  # embeddings, three stages, the rest
