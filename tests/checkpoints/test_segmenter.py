"""UperNet of OpenMMLab, both ways: a re-implementation of its heads in its names gives the same logits."""

import pytest
import torch
import torch.nn.functional as F
from conftest import PARITY
from torch import nn

import swin_hf
import swin_hf.cli
from swin_hf import (
    SwinHFBackbone,
    SwinHFConfig,
    SwinHFForImageClassification,
    SwinHFForSemanticSegmentation,
    export_checkpoint,
    load_checkpoint,
)

SIZES = {"image_size": 64, "embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (2, 2, 4, 4), "window_size": 4}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


class ConvModule(nn.Module):
    """mmcv's: convolution without bias, batch normalisation, ReLU."""

    def __init__(self, inputs, outputs, kernel):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class UPerHead(nn.Module):
    """mmseg/models/decode_heads/uper_head.py, as its paper and its names have it."""

    def __init__(self, channels, hidden, classes):
        super().__init__()
        pool = [nn.Sequential(nn.AdaptiveAvgPool2d(n), ConvModule(channels[-1], hidden, 1)) for n in (1, 2, 3, 6)]
        self.psp_modules = nn.ModuleList(pool)
        self.bottleneck = ConvModule(channels[-1] + 4 * hidden, hidden, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(c, hidden, 1) for c in channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(hidden, hidden, 3) for _ in channels[:-1])
        self.fpn_bottleneck = ConvModule(len(channels) * hidden, hidden, 3)
        self.conv_seg = nn.Conv2d(hidden, classes, 1)

    def forward(self, maps):
        top, size = maps[-1], maps[-1].shape[2:]
        pooled = [F.interpolate(part(top), size=size, mode="bilinear") for part in self.psp_modules]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=False)]
        laterals.append(self.bottleneck(torch.cat([top, *pooled], 1)))
        for level in range(len(laterals) - 1, 0, -1):
            below = laterals[level - 1]
            laterals[level - 1] = below + F.interpolate(laterals[level], size=below.shape[2:], mode="bilinear")
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)] + [laterals[-1]]
        size = outputs[0].shape[2:]
        outputs = [outputs[0], *(F.interpolate(x, size=size, mode="bilinear") for x in outputs[1:])]
        return self.conv_seg(self.fpn_bottleneck(torch.cat(outputs, 1)))


class FCNHead(nn.Module):
    """mmseg/models/decode_heads/fcn_head.py with one convolution."""

    def __init__(self, inputs, hidden, classes):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(inputs, hidden, 3))
        self.conv_seg = nn.Conv2d(hidden, classes, 1)

    def forward(self, maps):
        return self.conv_seg(self.convs(maps[2]))


def lively(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                low, high = (0.5, 1.5) if tensor.ndim == 1 or "running_var" in name else (-0.2, 0.2)
                tensor.copy_(torch.empty_like(tensor).uniform_(low, high, generator=generator))
    return module.eval()


@pytest.fixture(scope="module")
def theirs():
    """Backbone, heads and the state dict of a file of mmsegmentation."""
    backbone = lively(SwinHFBackbone(SwinHFConfig(**SIZES, out_features=STAGES)), 0)
    channels = [16, 32, 64, 128]
    heads = {"decode_head": UPerHead(channels, 24, 5), "auxiliary_head": FCNHead(channels[2], 12, 5)}
    state = export_checkpoint(backbone, "openmmlab")
    for number, (name, head) in enumerate(heads.items(), start=1):
        state |= {f"{name}.{key}": value for key, value in lively(head, number).state_dict().items()}
    return backbone, heads, state


def test_logits_and_loss_are_those_of_the_re_implementation(theirs):
    backbone, heads, state = theirs
    model = load_checkpoint({"state_dict": state})
    assert type(model) is SwinHFForSemanticSegmentation
    assert (model.config.num_labels, model.config.upernet["hidden_size"]) == (5, 24)
    assert model.config.upernet["auxiliary_channels"] == 12
    pixels, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 5, (2, 64, 96))
    with torch.no_grad():
        maps = backbone(pixels).feature_maps
        logits = {name: head(maps) for name, head in heads.items()}
        ours = model(pixels, labels=labels)
    torch.testing.assert_close(ours.logits, logits["decode_head"], **PARITY)
    losses = [F.cross_entropy(F.interpolate(x, size=(64, 96), mode="bilinear"), labels) for x in logits.values()]
    torch.testing.assert_close(ours.loss, losses[0] + 0.4 * losses[1], **PARITY)


def test_it_is_written_back_bit_for_bit(theirs):
    state = theirs[2]
    written = export_checkpoint(load_checkpoint(state), "openmmlab")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)
    assert written["decode_head.bottleneck.bn.num_batches_tracked"].dtype == torch.int64


def test_its_trunk_serves_the_other_classes_too(theirs, tmp_path):
    backbone, _, state = theirs
    torch.save({"state_dict": state}, tmp_path / "upernet.pth")
    again = swin_hf.load_backbone(tmp_path / "upernet.pth")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs_ in zip(again(pixels).feature_maps, backbone(pixels).feature_maps, strict=True):
            torch.testing.assert_close(ours, theirs_, **PARITY)
    classifier = load_checkpoint(tmp_path / "upernet.pth", model_class=SwinHFForImageClassification)
    assert torch.equal(
        classifier.swin.stages[0].blocks[0].mlp.fc1.weight, backbone.swin.stages[0].blocks[0].mlp.fc1.weight
    )


def test_a_file_without_the_auxiliary_head_has_none(theirs):
    state = {name: value for name, value in theirs[2].items() if not name.startswith("auxiliary_head.")}
    model = load_checkpoint(state)
    assert model.auxiliary_head is None and model.config.upernet["auxiliary_loss_weight"] == 0


def test_a_head_of_another_kind_leaves_the_backbone(theirs):
    state = {name: value for name, value in theirs[2].items() if not name.startswith(("decode_head.", "auxiliary_"))}
    state["decode_head.conv_seg.weight"] = torch.zeros(5, 24, 1, 1)
    assert type(load_checkpoint(state)) is SwinHFForImageClassification


def test_our_own_segmenter_is_converted_and_described(theirs, tmp_path, capsys):
    model = load_checkpoint(theirs[2])
    model.save_pretrained(tmp_path / "model")
    assert swin_hf.cli.main(["info", str(tmp_path / "model")]) == 0
    assert "segmenter" in capsys.readouterr().out
    swin_hf.convert_checkpoint(tmp_path / "model", tmp_path / "upernet.pth", to="openmmlab")
    written = torch.load(tmp_path / "upernet.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(written[name], value) for name, value in theirs[2].items())


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("tiny", 59.9),
        pytest.param("small", 81.3, marks=pytest.mark.slow),
        pytest.param("base", 121.3, marks=pytest.mark.slow),
    ],
)
def test_the_released_sizes_are_read_and_written(size, parameters):
    """60, 81 and 121 million parameters, as the table of the repository has them."""
    config = SwinHFConfig.from_preset(f"swin_{size}_patch4_window7_224", num_labels=150)
    model = SwinHFForSemanticSegmentation(config)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(parameters, abs=0.1)
    state = export_checkpoint(model, "openmmlab")
    again = load_checkpoint(state)
    assert again.config.upernet == model.config.upernet
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
