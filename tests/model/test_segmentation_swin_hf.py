"""The segmenter: transformers' UperNet on the same weights, what it refuses, and that it is saved and found again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import PARITY
from transformers import AutoModelForSemanticSegmentation, UperNetConfig, UperNetForSemanticSegmentation

from swin_hf import SwinHFBackbone, SwinHFConfig, SwinHFForImageClassification
from swin_hf.model.segmentation_swin_hf import SwinHFForSemanticSegmentation

UPERNET = {"hidden_size": 24, "auxiliary_channels": 16}
SIZES = {
    "image_size": 64,
    "embed_dim": 16,
    "depths": (1, 2, 1, 1),
    "num_heads": (2, 2, 4, 4),
    "window_size": 4,
    "encoder_stride": 32,
}


def lively(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every weight and every statistic a value that a mix-up of keys would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                low, high = (0.5, 1.5) if tensor.ndim == 1 or "running_var" in name else (-0.1, 0.1)
                tensor.copy_(torch.empty_like(tensor).uniform_(low, high, generator=generator))
    return model


@pytest.fixture
def model() -> SwinHFForSemanticSegmentation:
    return lively(SwinHFForSemanticSegmentation(SwinHFConfig(**SIZES, num_labels=5, upernet=UPERNET))).eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (2, 60, 72), generator=generator)
    labels[0, :7] = 255
    return torch.randn(2, 3, 60, 72, generator=generator), labels


def peer_of(model: SwinHFForSemanticSegmentation) -> UperNetForSemanticSegmentation:
    backbone = SwinHFConfig(**SIZES, out_features=["stage1", "stage2", "stage3", "stage4"])
    peer = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=5, **UPERNET))
    trunk = ("swin.", "hidden_states_norms.")
    peer.load_state_dict({f"backbone.{k}" if k.startswith(trunk) else k: v for k, v in model.state_dict().items()})
    return peer


def test_logits_loss_and_gradients_are_those_of_transformers(model, batch):
    pixels, labels = batch
    peer = peer_of(model).eval()
    ours, theirs = model(pixels, labels=labels), peer(pixels, labels=labels)
    assert ours.logits.shape == (2, 5, 15, 18)
    whole = F.interpolate(ours.logits, size=(60, 72), mode="bilinear", align_corners=False)
    torch.testing.assert_close(whole, theirs.logits, **PARITY)
    torch.testing.assert_close(ours.loss, theirs.loss, **PARITY)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = {k.removeprefix("backbone."): v.grad for k, v in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], **PARITY)


def test_every_parameter_trains(model, batch):
    model.train()(*batch).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_pixels_without_a_label_have_no_loss(model, batch):
    pixels, labels = batch
    model.train()
    loss = model(pixels, labels=torch.full_like(labels, 255)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(bool(parameter.grad.eq(0).all()) for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_may_be_integers_of_any_type(model, batch, dtype):
    pixels, labels = batch
    assert torch.equal(model(pixels, labels=labels.to(dtype)).loss, model(pixels, labels=labels).loss)


def test_labels_that_are_not_integers_are_refused(model, batch):
    pixels, labels = batch
    with pytest.raises(ValueError, match=r"labels are of the type torch\.float32"):
        model(pixels, labels=labels.float())


def test_the_heads_drop_whole_channels_in_training_only(model, batch):
    head = model.decode_head.classifier
    x = torch.ones(4, 24, 3, 3)
    torch.testing.assert_close(head(x), F.conv2d(x, head.weight, head.bias))
    head.train()
    torch.manual_seed(0)
    with torch.no_grad():
        head.weight.fill_(1.0)
        head.bias.zero_()
        outputs = head(x)  # 4, 5, 3, 3
    assert (outputs.std(dim=(2, 3)) < 1e-5).all()  # a channel is dropped everywhere or nowhere
    kept = outputs[:, 0, 0, 0] * 0.9
    torch.testing.assert_close(kept, kept.round())
    assert (kept < 24).any()


def test_it_is_saved_and_found_by_its_auto_class(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(again) is SwinHFForSemanticSegmentation
    assert torch.equal(again(batch[0]).logits, model(batch[0]).logits)
    assert again.config.upernet == model.config.upernet


@pytest.mark.parametrize("source_class", [SwinHFForImageClassification, SwinHFBackbone])
def test_the_trunk_of_any_swin_is_a_starting_point(source_class, tmp_path):
    source = lively(source_class(SwinHFConfig(**SIZES, out_features=["stage1", "stage2", "stage3", "stage4"])))
    source.save_pretrained(tmp_path)
    model = SwinHFForSemanticSegmentation.from_pretrained(tmp_path, num_labels=5, upernet=UPERNET, strict=True)
    kept = {name: value for name, value in source.state_dict().items() if name in model.state_dict()}
    assert len(kept) == sum(name.startswith("swin.") for name in model.state_dict()) + 8 * (
        source_class is SwinHFBackbone
    )
    for name, value in kept.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_single_picture_cannot_train(model, batch):
    pixels, labels = batch
    model.train()
    with pytest.raises(ValueError, match="batch normalisation cannot train on a single picture"):
        model(pixels[:1], labels=labels[:1])
    model.decode_head.eval()
    assert model(pixels[:1]).logits.shape == (1, 5, 15, 18)


def test_labels_of_another_size_are_refused(model, batch):
    with pytest.raises(ValueError, match=r"labels have the shape \(2, 15, 18\)"):
        model(batch[0], labels=batch[1][:, ::4, ::4])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hidden_size": 0}, "upernet.hidden_size is 0"),
        ({"hidden_size": 10**9}, "must be in"),
        ({"dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"pool_scales": [0]}, "pool_scales"),
        ({"pool_scales": 3}, "pool_scales is 3; it is a list"),
        ({"channels": 3}, "is a dictionary of hidden_size"),
        (7, "is a dictionary of hidden_size"),
    ],
)
def test_sizes_out_of_range_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        SwinHFForSemanticSegmentation(SwinHFConfig(**SIZES, upernet=copy.copy(given)))
    with pytest.raises(ValueError, match="num_labels is 0; a segmenter has at least one class"):
        SwinHFForSemanticSegmentation(SwinHFConfig(**SIZES | {"num_labels": 0}))
