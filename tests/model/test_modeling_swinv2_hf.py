"""Swin V2 against transformers, timm and torchvision, and against its definition written with loops.

Weights are copied by the tables of this file, not by ``swin_hf.checkpoints``, so that neither vouches for the other.
"""

import math
import re

import pytest
import torch
from conftest import PARITY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swin_hf import (
    SwinV2HFBackbone,
    SwinV2HFConfig,
    SwinV2HFForImageClassification,
    SwinV2HFForMaskedImageModeling,
    SwinV2HFModel,
)
from swin_hf.model.attention import backend_report, clear_caches
from swin_hf.model.modeling_swinv2_hf import SwinV2HFAttention, cosine_attention_inputs
from swin_hf.model.windows import log_spaced_offsets, pad_to_windows, window_geometry

SIZES = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "image_size": 128, "window_size": 4}
TINY = {
    "image_size": (32, 48),
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (1, 2, 1),
    "num_heads": (2, 2, 4),
    "window_size": (4, 3),
    "encoder_stride": 8,
    "num_labels": 5,
}
AWKWARD = {**TINY, "image_size": (30, 46), "depths": (2, 2, 2), "window_size": 7}  # every stage is padded
ALL = [SwinV2HFModel, SwinV2HFForImageClassification, SwinV2HFForMaskedImageModeling, SwinV2HFBackbone]

# Pattern in the other layout -> ours.
TRANSFORMERS = {
    r"^swinv2\.": "swin.",
    r"^(embeddings|encoder|layernorm)": r"swin.\1",
    r"patch_embeddings\.projection": "patch_embeddings",
    r"encoder\.layers\.": "stages.",
    r"^swin\.layernorm\.": "swin.norm.",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"self\.continuous_position_bias_mlp": "cpb_mlp",
    r"self\.logit_scale": "logit_scale",
    r"attention\.output\.dense": "attention.proj",
    r"self\.query\.bias": "q_bias",
    r"self\.value\.bias": "v_bias",
    r"self\.query": "0",
    r"self\.key": "1",
    r"self\.value": "2",
    r"intermediate\.dense": "mlp.fc1",
    r"(\d)\.output\.dense": r"\1.mlp.fc2",
}
TIMM = {
    r"^patch_embed\.proj": "swin.embeddings.patch_embeddings",
    r"^patch_embed\.norm": "swin.embeddings.norm",
    r"^layers\.(\d)\.downsample": lambda match: f"swin.stages.{int(match[1]) - 1}.downsample",
    r"^layers\.": "swin.stages.",
    r"\.attn\.": ".attention.",
    r"^norm\.": "swin.norm.",
    r"^head\.fc": "classifier",
}
TORCHVISION = {
    r"^features\.0\.0": "swin.embeddings.patch_embeddings",
    r"^features\.0\.2": "swin.embeddings.norm",
    r"^features\.([246])\.": lambda match: f"swin.stages.{int(match[1]) // 2 - 1}.downsample.",
    r"^features\.([1357])\.": lambda match: f"swin.stages.{int(match[1]) // 2}.blocks.",
    r"\.attn\.": ".attention.",
    r"mlp\.0": "mlp.fc1",
    r"(?<!cpb_)mlp\.3": "mlp.fc2",
    r"^norm\.": "swin.norm.",
    r"^head\.": "classifier.",
}
TORCHVISION[r"cpb_mlp\.fc1"] = "cpb_mlp.0"


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter a value that matters: norms of blocks start at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "logit_scale" in name:
                parameter.copy_(noise + math.log(10))
            elif parameter.ndim == 1:
                parameter.copy_(noise * 0.1 + ("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model.eval()


def copy_weights(theirs: nn.Module, ours: nn.Module, table: dict) -> nn.Module:
    """Load their weights into ours; each of ours must be filled."""
    state: dict[str, Tensor] = {}
    for key, value in theirs.state_dict().items():
        for pattern, name in table.items():
            key = re.sub(pattern, name, key)
        state[key] = value
    for key in [key for key in state if "attention.0.weight" in key]:
        parts = [state[key.replace("attention.0.", f"attention.{part}.")] for part in range(3)]
        state[key.replace("attention.0.", "attention.qkv.")] = torch.cat(parts)
    for key in [key for key in state if key.endswith("qkv.bias")]:  # torchvision, which ignores the middle third
        stem = key.removesuffix("qkv.bias")
        state[stem + "q_bias"], _, state[stem + "v_bias"] = state[key].chunk(3)
    if not any(key.startswith("swin.") for key in ours.state_dict()):
        state = {key.removeprefix("swin."): value for key, value in state.items()}
    missing = ours.load_state_dict(state, strict=False).missing_keys
    assert not missing, missing
    return ours.eval()


def pixels(height: int = 128, width: int = 128) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def tiny(model_class=SwinV2HFForImageClassification, **fields):
    return randomise(model_class(SwinV2HFConfig(**{**TINY, **fields})))


@pytest.fixture
def single_mask(monkeypatch):
    """transformers adds the shift mask twice: with half of it, its sum is the reference's -100."""
    from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

    original = Swinv2Layer.get_attn_mask

    def half(self, *args, **kwargs):
        mask = original(self, *args, **kwargs)
        return None if mask is None else mask / 2

    monkeypatch.setattr(Swinv2Layer, "get_attn_mask", half)


# ------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("pretrained", [(0, 0, 0, 0), (3, 3, 3, 2)], ids=str)
@pytest.mark.parametrize("size", [(128, 128), (118, 102)], ids=["divisible", "padded"])
def test_classifier_equals_transformers(size, pretrained, backend, single_mask):
    from transformers import Swinv2Config, Swinv2ForImageClassification

    fields = {**SIZES, "pretrained_window_sizes": pretrained, "num_labels": 5}
    theirs = randomise(Swinv2ForImageClassification(Swinv2Config(**fields)))
    ours = copy_weights(theirs, SwinV2HFForImageClassification(SwinV2HFConfig(**fields)), TRANSFORMERS)
    ours.set_attn_implementation(backend)
    with torch.no_grad():
        expected = theirs(pixels(*size), labels=torch.tensor([3, 0]), output_hidden_states=True)
        output = ours(pixels(*size), labels=torch.tensor([3, 0]), output_hidden_states=True)
    assert set(output.keys()) == set(expected.keys())
    for name in expected:
        torch.testing.assert_close(output[name], expected[name], **PARITY)


def test_attentions_equal_transformers(single_mask):
    from transformers import Swinv2Config, Swinv2Model

    theirs = randomise(Swinv2Model(Swinv2Config(**SIZES)))
    ours = copy_weights(theirs, SwinV2HFModel(SwinV2HFConfig(**SIZES)), TRANSFORMERS)
    with torch.no_grad():
        expected = theirs(pixels(), output_attentions=True).attentions
        for attention, theirs_ in zip(ours(pixels(), output_attentions=True).attentions, expected, strict=True):
            torch.testing.assert_close(attention, theirs_, **PARITY)


@pytest.mark.parametrize("norm_features", [False, True], ids=["maps", "normalised-maps"])
def test_backbone_equals_transformers(norm_features, single_mask):
    from transformers import Swinv2Backbone, Swinv2Config

    stages = {"out_features": ["stem", "stage2", "stage4"]}
    theirs = randomise(Swinv2Backbone(Swinv2Config(**SIZES, **stages)))
    ours = SwinV2HFBackbone(SwinV2HFConfig(**SIZES, **stages, norm_features=norm_features))
    if norm_features:  # transformers has no norms to compare with: these are new
        state = copy_weights(
            theirs, SwinV2HFBackbone(SwinV2HFConfig(**SIZES, **stages, norm_features=False)), TRANSFORMERS
        )
        ours.load_state_dict(state.state_dict(), strict=False)
        ours.eval()
    else:
        assert not any("hidden_states_norms" in key for key in ours.state_dict())
        copy_weights(theirs, ours, TRANSFORMERS)
    with torch.no_grad():
        for map_, expected in zip(ours(pixels()).feature_maps, theirs(pixels()).feature_maps, strict=True):
            if norm_features:
                expected = nn.functional.layer_norm(expected.permute(0, 2, 3, 1), expected.shape[1:2])
                expected = expected.permute(0, 3, 1, 2)
            torch.testing.assert_close(map_, expected, **PARITY)


def test_masked_image_model_equals_transformers(single_mask):
    from transformers import Swinv2Config, Swinv2ForMaskedImageModeling

    theirs = randomise(Swinv2ForMaskedImageModeling(Swinv2Config(**SIZES)))
    ours = SwinV2HFForMaskedImageModeling(SwinV2HFConfig(**SIZES, norm_targets=None))
    copy_weights(theirs, ours, TRANSFORMERS)
    mask = torch.rand(2, 32 * 32, generator=torch.Generator().manual_seed(3)) < 0.6
    with torch.no_grad():
        expected, output = theirs(pixels(), bool_masked_pos=mask), ours(pixels(), bool_masked_pos=mask)
    torch.testing.assert_close(output.reconstruction, expected.reconstruction, **PARITY)
    torch.testing.assert_close(output.loss, expected.loss, **PARITY)


@pytest.mark.parametrize("size", [(128, 128), (128, 64)], ids=["square", "one-axis-covered"])
@pytest.mark.parametrize("pretrained", [(0, 0, 0, 0), (6, 6, 6, 3)], ids=str)
def test_classifier_equals_timm(size, pretrained):
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    theirs = SwinTransformerV2(
        img_size=size,
        embed_dim=16,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=8,
        num_classes=5,
        pretrained_window_sizes=pretrained,
    )
    fields = {**SIZES, "image_size": size, "window_size": 8, "shift_per_axis": True}
    config = SwinV2HFConfig(**fields, pretrained_window_sizes=pretrained, num_labels=5)
    ours = copy_weights(randomise(theirs), SwinV2HFForImageClassification(config), TIMM)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels(*size)).logits, theirs(pixels(*size)), **PARITY)


@pytest.mark.parametrize("size", [(128, 128), (120, 104)], ids=["divisible", "padded"])
def test_classifier_equals_torchvision(size):
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    theirs = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 4, 8],
        window_size=[4, 4],
        num_classes=5,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )
    config = SwinV2HFConfig(**SIZES, shift_per_axis=True, num_labels=5)
    ours = copy_weights(randomise(theirs), SwinV2HFForImageClassification(config), TORCHVISION)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels(*size)).logits, theirs(pixels(*size)), **PARITY)


# ---------------------------------------------------------------------------------------------------------- attention


def layer_of(window, unit, backend: str, **fields) -> SwinV2HFAttention:
    config = SwinV2HFConfig(embed_dim=8, depths=[1], num_heads=[2], window_size=window, **fields)
    config._attn_implementation = backend
    layer = SwinV2HFAttention(config, 8, 2, window)
    layer.unit = unit
    return randomise(layer)


def attend_with_loops(layer: SwinV2HFAttention, x: Tensor, grid, window, shift, mask_padding: bool) -> Tensor:
    """Equations 2 to 4 token by token, in image coordinates.

    A token outside of the window, or of the part of it that the shift left at the other border of the map, is not
    looked at, which the -100 of the reference is an approximation of.
    """
    (height, width), heads = x.shape[1:3], layer.num_heads
    bias = torch.cat([layer.q_bias, torch.zeros(8), layer.v_bias])
    query, key, value = (layer.qkv(x) + bias).unflatten(-1, (3, heads, -1)).unbind(-3)  # B, Hp, Wp, h, d
    scale = torch.tensor([min(math.exp(logit), 100) for logit in layer.logit_scale.flatten().tolist()])

    def coordinate(offset: int, unit: int) -> float:
        scaled = 8 * offset / max(unit - 1, 1)
        return math.copysign(math.log2(1 + abs(scaled)) / math.log2(8), scaled)

    cell = {
        (row, column): ((row - shift[0]) // window[0], (column - shift[1]) // window[1])
        for row in range(height)
        for column in range(width)
    }
    unit = layer.unit
    biases = {
        (down, right): 16
        * layer.cpb_mlp(torch.tensor([coordinate(down, unit[0]), coordinate(right, unit[1])])).sigmoid()
        for down in range(1 - window[0], window[0])
        for right in range(1 - window[1], window[1])
    }
    out = torch.zeros_like(query)
    for at, where in cell.items():
        others = [other for other, there in cell.items() if there == where]
        if mask_padding:
            others = [other for other in others if other[0] < grid[0] and other[1] < grid[1]] or others
        scores = []
        for row, column in others:
            q, k = query[:, at[0], at[1]], key[:, row, column]  # B, h, d
            product = q.norm(dim=-1) * k.norm(dim=-1)
            cosine = torch.where(product > 0, (q * k).sum(-1) / product, torch.zeros_like(product))  # B, h
            scores.append(scale * cosine + biases[at[0] - row, at[1] - column])
        weights = torch.stack(scores).softmax(0)  # others, B, h
        values = torch.stack([value[:, row, column] for row, column in others])  # others, B, h, d
        out[:, at[0], at[1]] = (weights[..., None] * values).sum(0)
    return layer.proj(out.flatten(-2))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    unit=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    shifted=st.booleans(),
    per_axis=st.booleans(),
    masked=st.booleans(),
)
@settings(max_examples=15)
def test_equals_the_definition_written_with_loops(backend, grid, window, unit, shifted, per_axis, masked):
    geometry = window_geometry(grid, window, shifted, shift_per_axis=per_axis)
    layer = layer_of(window, unit, backend, mask_padding=masked)
    x = pad_to_windows(torch.randn(1, *grid, 8), geometry)
    with torch.no_grad():
        ours = layer(x, geometry)[0]
        expected = attend_with_loops(layer, x, grid, geometry.window, geometry.shift, masked)
    real = (slice(None), slice(grid[0]), slice(grid[1]))
    torch.testing.assert_close(ours[real], expected[real], atol=1e-5, rtol=1e-4)


def test_offsets_are_those_of_the_paper():
    """Equation 4, and Microsoft's scaling of it: 8 is the offset of the far end, and there the coordinate is 1.0566."""
    offsets = log_spaced_offsets((3, 2), (3, 2))
    assert offsets.shape == (5 * 3, 2)
    assert offsets[0].tolist() == pytest.approx([-math.log2(9) / 3, -math.log2(9) / 3])
    assert offsets[7].tolist() == [0, 0]
    assert offsets[-2].tolist() == pytest.approx([math.log2(9) / 3, 0])
    grown = log_spaced_offsets((5, 5), (3, 3)).view(9, 9, 2)  # the offsets in common have the same coordinates
    torch.testing.assert_close(grown[2:-2, 2:-2].reshape(-1, 2), log_spaced_offsets((3, 3), (3, 3)))
    assert log_spaced_offsets((1, 1), (1, 1)).tolist() == [[0, 0]]  # Microsoft divides by zero


def test_a_mask_of_100_can_leak_as_in_the_reference():
    """With the scale at its limit, a cosine of 1 makes up for the mask: additive -100, not minus infinity."""
    layer = layer_of((2, 2), (2, 2), "eager")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.logit_scale.fill_(10.0)  # the clamp makes it ln 100
        layer.qkv.weight[:16] = torch.cat([torch.eye(8), torch.eye(8)])
    x = torch.ones(1, 4, 4, 8)
    geometry = window_geometry((4, 4), (2, 2), True)
    probabilities = layer(x, geometry, output_attentions=True)[1]
    corner = probabilities[-1, 0, 0]
    assert corner[0] == 1 and corner[1] < 1e-40  # equal cosines: the mask holds
    x[0, 2, 2] = -1.0  # the tokens of the query's own region are opposite to it, those of others are alike
    weights = layer(x, geometry, output_attentions=True)[1]
    assert weights.isfinite().all()


def test_zero_stays_zero_and_has_no_gradient():
    given = torch.randn(2, 3, 5, 2, 4)  # queries and keys
    given[:, 1, 2] = 0.0
    given.requires_grad_()
    scale = torch.full((2, 1, 1), math.log(10), requires_grad=True)
    query, key = cosine_attention_inputs(*given, scale)
    assert (query[1, 2] == 0).all() and (key[1, 2] == 0).all()
    torch.testing.assert_close(query[0].norm(dim=-1), torch.full((5, 2), 10.0))
    torch.testing.assert_close(key[0].norm(dim=-1), torch.ones(5, 2))
    ((query + 2 * key) * torch.randn_like(query)).sum().backward()
    assert (given.grad[:, 1, 2] == 0).all() and given.grad.isfinite().all() and scale.grad.isfinite().all()
    assert (given.grad[:, 0] != 0).all()


def test_cosines_differentiate_what_they_compute():
    given = [torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64).view(2, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(cosine_attention_inputs, (*given, scale))
    for vectors, out in zip(given, cosine_attention_inputs(*given, torch.zeros(2, 1, 1)), strict=True):
        torch.testing.assert_close(out, nn.functional.normalize(vectors, dim=-1))


def test_the_scale_is_cut_off_and_then_has_no_gradient():
    scale = torch.tensor([4.0, 5.0]).view(2, 1, 1).requires_grad_()
    query, _ = cosine_attention_inputs(*torch.randn(2, 2, 3, 2, 4), scale)
    torch.testing.assert_close(query[:, :, 1].norm(dim=-1), torch.full((2, 3), 100.0))
    query.sum().backward()
    assert scale.grad[0] != 0 and scale.grad[1] == 0


@pytest.mark.parametrize("grid", [(8, 8), (10, 7), (3, 5)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_sdpa_equals_eager_with_gradients(grid, shifted):
    geometry = window_geometry(grid, (4, 4), shifted)
    results = []
    x = torch.randn(2, *grid, 8)
    for backend in ("eager", "sdpa"):
        layer = layer_of((4, 4), (4, 4), backend).train()
        leaf = x.clone().requires_grad_()
        out = layer(pad_to_windows(leaf, geometry), geometry)[0]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out, leaf.grad, *(parameter.grad for parameter in layer.parameters())))
    for eager, sdpa in zip(*results, strict=True):
        assert eager.abs().sum() > 0
        torch.testing.assert_close(sdpa, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("way", ["half", "bfloat16", "half-autocast", "bfloat16-autocast"])
def test_low_precision_is_finite_on_padded_maps_and_near_float32(way, backend):
    """A padded token has a key of zeros: peers divide zero by an epsilon that half precision rounds to zero."""
    dtype = torch.float16 if "half" in way else torch.bfloat16
    model = tiny(**AWKWARD)
    model.set_attn_implementation(backend)
    x, labels = torch.randn(2, 3, 30, 46, generator=torch.Generator().manual_seed(5)), torch.tensor([0, 3])
    exact = model(x, labels=labels)
    exact.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    if "autocast" in way:
        with torch.autocast("cpu", dtype):
            output = model(x, labels=labels)
    else:
        model.to(dtype)
        output = model(x, labels=labels)
    output.loss.float().backward()
    rounding = 40 * torch.finfo(dtype).eps  # of a few dozen layers
    torch.testing.assert_close(output.logits.float(), exact.logits, atol=rounding, rtol=rounding)
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        distance = (parameter.grad.float() - expected[name]).norm() / expected[name].norm()
        assert distance < 10 * rounding, (name, distance)


def test_the_bias_is_computed_once_in_evaluation(monkeypatch):
    model = tiny()
    clear_caches()
    calls = []
    for module in model.modules():
        if isinstance(module, SwinV2HFAttention):
            inner = module.cpb_mlp[2]
            monkeypatch.setattr(inner, "forward", lambda x, f=inner.forward: calls.append(1) or f(x))
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        first = model(x).logits
        assert len(calls) == 4  # one for each block
        assert torch.equal(model(x).logits, first)
        assert len(calls) == 4
        model.swin.stages[0].blocks[0].attention.cpb_mlp[0].weight.data.mul_(1.5)
        changed = model(x).logits
        assert len(calls) == 5 and not torch.equal(changed, first)
    model.train()(x)
    model(x)
    assert len(calls) == 13  # training computes it anew


def test_auto_says_why_the_kernel_does_not_run():
    model = tiny()
    model.set_attn_implementation("auto")
    report = backend_report(model)
    assert report.backend == "sdpa"
    assert report.reasons["triton"] == ["the kernel has no cosine attention, which Swin Transformer V2 has"]
    model.set_attn_implementation("triton")
    with pytest.raises(NotImplementedError, match="cannot run here: the kernel has no cosine attention"):
        model(torch.randn(1, 3, 32, 48))


# ------------------------------------------------------------------------------------------------------------- models


def test_a_new_model_starts_as_microsofts():
    model = SwinV2HFForImageClassification(SwinV2HFConfig(**TINY, extra_norm_every_n_blocks=2))
    for name, parameter in model.named_parameters():
        if "logit_scale" in name:
            torch.testing.assert_close(parameter, torch.full_like(parameter, math.log(10)))
        elif re.search(r"blocks\.\d\.norm[12]\.|bias$", name) and "patch_embeddings" not in name:
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif "patch_embeddings" not in name:
            assert 0.01 < parameter.std() < 0.03, name
    x = torch.randn(2, 16, 24, 16)
    for block in model.swin.stages[0].blocks:
        assert torch.equal(block(x)[0], x)  # each block is the identity


def test_extra_norms_equal_their_definition():
    """After every second block of a stage, each token of the main branch is normalised over its channels."""
    model = tiny(depths=(1, 5, 2), extra_norm_every_n_blocks=2)
    plain = tiny(depths=(1, 5, 2))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".norm3." not in name})
    with torch.no_grad():
        x = plain.swin.embeddings(pixels(32, 48))
        for plain_stage, stage in zip(plain.swin.stages, model.swin.stages, strict=True):
            for number, block in enumerate(plain_stage.blocks, start=1):
                x = block(x)[0]
                if number % 2 == 0:
                    norm = stage.blocks[number - 1].norm3
                    centred = x - x.mean(-1, keepdim=True)
                    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
            if plain_stage.downsample is not None:
                x = plain_stage.downsample(x)
        expected = plain.classifier(plain.swin.norm(x).mean((1, 2)))
        torch.testing.assert_close(model(pixels(32, 48)).logits, expected, **PARITY)
        assert not torch.allclose(plain(pixels(32, 48)).logits, expected, atol=1e-2)


def test_every_parameter_learns_after_the_first_step():
    model = SwinV2HFForImageClassification(SwinV2HFConfig(**AWKWARD, extra_norm_every_n_blocks=2)).train()
    x, labels = torch.randn(4, 3, 30, 46), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x, labels=labels).loss.backward()
        optimizer.step()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum()]
    assert not silent


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = SwinV2HFForImageClassification(SwinV2HFConfig(**TINY, drop_path_rate=0.0)).train()
    x, labels = torch.randn(4, 3, 32, 48), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = model(x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_keys_have_no_bias_as_a_parameter():
    attention = SwinV2HFModel(SwinV2HFConfig(**TINY)).stages[0].blocks[0].attention
    names = {name for name, _ in attention.named_parameters() if "bias" in name}
    assert names == {"q_bias", "v_bias", "proj.bias", "cpb_mlp.0.bias"}
    without = SwinV2HFModel(SwinV2HFConfig(**TINY, qkv_bias=False)).stages[0].blocks[0].attention
    assert without.q_bias is None and without.v_bias is None and without.qkv.bias is None


@pytest.mark.parametrize(("height", "width"), [(2, 2), (30, 46), (33, 47), (64, 20)])
@pytest.mark.parametrize("model_class", ALL)
def test_any_size_runs(model_class, height, width):
    model = tiny(model_class)
    with torch.no_grad():
        output = model(torch.randn(1, 3, height, width)).to_tuple()
    for value in output:
        for tensor in [value] if isinstance(value, Tensor) else value:
            assert tensor.isfinite().all()


def test_another_size_leaves_no_trace():
    model = tiny()
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        before = model(x).logits
        model(torch.randn(1, 3, 10, 6))
        assert torch.equal(model(x).logits, before)


def test_a_small_map_keeps_the_bias_of_its_offsets():
    layer = layer_of((8, 8), (8, 8), "eager")
    small, large = layer.relative_position_bias((3, 2))[0], layer.relative_position_bias((8, 8))[0]
    places = [8 * row + column for row in range(3) for column in range(2)]
    torch.testing.assert_close(small, large[:, places][:, :, places])


@pytest.mark.parametrize(("old", "new"), [((32, 48), (64, 96)), ((64, 96), (32, 48))])
def test_new_windows_keep_the_bias_of_every_offset(old, new, tmp_path):
    model = tiny(image_size=old, window_size=(4, 3) if old == (32, 48) else (8, 6))
    units = model.config.bias_units
    layer = model.swin.stages[0].blocks[0].attention
    before = layer.relative_position_bias((3, 3))
    model.save_pretrained(tmp_path)
    model.set_input_size(new, (8, 6) if old == (32, 48) else (4, 3))
    assert layer.window == ((8, 6) if old == (32, 48) else (4, 3))
    assert model.config.bias_units == units
    assert torch.equal(layer.relative_position_bias((3, 3)), before)
    x = torch.randn(1, 3, *new)
    again = SwinV2HFForImageClassification.from_pretrained(
        tmp_path, image_size=new, window_size=layer.window, strict=True
    )
    assert again.config.pretrained_window_sizes == model.config.pretrained_window_sizes
    with torch.no_grad():
        expected = model(x).logits
        torch.testing.assert_close(again(x).logits, expected)
        again.save_pretrained(tmp_path / "resized")
        saved = SwinV2HFForImageClassification.from_pretrained(tmp_path / "resized", strict=True)
        torch.testing.assert_close(saved(x).logits, expected)


def test_the_transfer_rule_is_microsofts():
    """Window 12 at 192 pixels becomes 16 at 256: the windows that it was trained with, 6 in the last stage, stay."""
    with torch.device("meta"):
        model = SwinV2HFModel(SwinV2HFConfig.from_preset("swinv2_base_patch4_window12_192_22k"))
    model.set_input_size(256, 16)
    released = SwinV2HFConfig.from_preset("swinv2_base_patch4_window12to16_192to256_22kto1k_ft")
    assert model.config.pretrained_window_sizes == released.pretrained_window_sizes == [12, 12, 12, 6]
    model.set_input_size(384, 24)
    assert model.config.pretrained_window_sizes == [12, 12, 12, 6]
    assert [stage.blocks[0].attention.unit for stage in model.stages] == [(12, 12)] * 3 + [(6, 6)]


def test_an_image_size_that_changes_no_window_leaves_the_pretrained_ones_alone():
    model = tiny(image_size=64, window_size=4)
    model.set_input_size(128)
    assert model.config.pretrained_window_sizes == [0, 0, 0]


def test_resizing_equals_timm_with_its_pretrained_windows_set():
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    def build(size, window, pretrained):
        sizes = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "num_classes": 5}
        return SwinTransformerV2(img_size=size, window_size=window, pretrained_window_sizes=pretrained, **sizes)

    small = randomise(build(128, 8, (0, 0, 0, 0)))
    config = SwinV2HFConfig(**{**SIZES, "window_size": 8}, shift_per_axis=True, num_labels=5)
    ours = copy_weights(small, SwinV2HFForImageClassification(config), TIMM)
    large = build(256, 16, (8, 8, 8, 4)).eval()
    large.load_state_dict(small.state_dict())
    ours.set_input_size(256, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels(256, 256)).logits, large(pixels(256, 256)), **PARITY)


@pytest.mark.parametrize("model_class", ALL)
def test_an_empty_checkpoint_is_filled_as_a_new_model(model_class):
    config = SwinV2HFConfig(**TINY)
    with torch.device("meta"):
        fresh = model_class(config)
    fresh.to_empty(device="cpu")
    torch.manual_seed(0)
    fresh.init_weights()
    torch.manual_seed(0)
    loaded, report = model_class.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    assert set(report["missing_keys"]) == set(fresh.state_dict())
    for name, value in fresh.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


# The new names (activation_checkpointing_*) are unknown to the lowest transformers that is supported.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("model_class", ALL)
def test_gradient_checkpointing_changes_nothing(model_class):
    model = tiny(model_class, drop_path_rate=0.0).train()
    x = torch.randn(2, 3, 32, 48)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        output = model(x).to_tuple()[0]
        (output if isinstance(output, Tensor) else output[0]).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable()
    for again, first in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(again, first)


def test_targets_of_masked_pixels_are_normalised_over_47_pixels():
    assert SwinV2HFConfig().norm_targets == 47
    model = tiny(SwinV2HFForMaskedImageModeling)
    raw = tiny(SwinV2HFForMaskedImageModeling, norm_targets=None)
    x, mask = torch.randn(1, 3, 32, 48) * 5 + 3, torch.ones(1, 16, 24)
    with torch.no_grad():
        loss, raw_loss = model(x, bool_masked_pos=mask).loss, raw(x, bool_masked_pos=mask).loss
    assert loss < raw_loss / 2


@pytest.mark.slow
def test_compiles_to_one_graph():
    model = tiny(extra_norm_every_n_blocks=2)
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = model(x).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x).logits, expected, atol=1e-5, rtol=1e-4)
    model.train()
    compiled(x, labels=torch.tensor([0, 1])).loss.backward()
