"""Window attention against its definition written with loops, and the backends against each other.

The kernels of ``kernels_triton.py`` have tests of their own.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swin_hf import SwinHFConfig, SwinHFForImageClassification, SwinHFModel
from swin_hf.model.modeling_swin_hf import SwinHFAttention
from swin_hf.model.windows import pad_to_windows, window_geometry

# Two orders of summation in float32.
SAME_OUTPUT = {"atol": 1e-5, "rtol": 1e-5}
SAME_GRADIENT = {"atol": 1e-5, "rtol": 1e-5}


def attend_with_loops(layer: SwinHFAttention, x: Tensor, grid, window, shift, masked: bool) -> Tensor:
    """Section 3.2 token by token, in image coordinates: no roll, no partition, no index, no mask tensor.

    A token at (row, column) belongs to the window whose border, displaced by the shift, it lies behind; windows that
    the shift cuts at the image border hold the tokens of one corner, edge or interior only.
    """
    (padded_height, padded_width), heads = x.shape[1:3], layer.num_heads
    table = layer.relative_position_bias_table.view(2 * layer.window[0] - 1, 2 * layer.window[1] - 1, heads)
    query, key, value = layer.qkv(x).unflatten(-1, (3, heads, -1)).unbind(-3)  # B, Hp, Wp, h, d
    cell = {
        (row, column): ((row - shift[0]) // window[0], (column - shift[1]) // window[1])
        for row in range(padded_height)
        for column in range(padded_width)
    }
    out = torch.zeros_like(query)
    for at, where in cell.items():
        others = [other for other, there in cell.items() if there == where]
        if masked:
            others = [other for other in others if other[0] < grid[0] and other[1] < grid[1]] or others
        scores = [
            (query[:, at[0], at[1]] * key[:, row, column]).sum(-1) / math.sqrt(query.shape[-1])
            + table[at[0] - row + layer.window[0] - 1, at[1] - column + layer.window[1] - 1]
            for row, column in others
        ]
        weights = torch.stack(scores).softmax(0)  # others, B, h
        values = torch.stack([value[:, row, column] for row, column in others])  # others, B, h, d
        out[:, at[0], at[1]] = (weights[..., None] * values).sum(0)
    return layer.proj(out.flatten(-2))


def layer_of(window, backend: str, mask_padding: bool = False) -> SwinHFAttention:
    config = SwinHFConfig(embed_dim=8, depths=[1], num_heads=[2], window_size=window, mask_padding=mask_padding)
    config._attn_implementation = backend
    layer = SwinHFAttention(config, 8, 2, window).eval()
    torch.nn.init.normal_(layer.relative_position_bias_table)
    return layer


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    shifted=st.booleans(),
    per_axis=st.booleans(),
    always=st.booleans(),
    masked=st.booleans(),
)
@settings(max_examples=25)
def test_equals_the_definition_written_with_loops(backend, grid, window, shifted, per_axis, always, masked):
    geometry = window_geometry(grid, window, shifted, shift_per_axis=per_axis, always_partition=always)
    layer = layer_of(window, backend, masked)
    x = pad_to_windows(torch.randn(2, *grid, 8), geometry)
    with torch.no_grad():
        ours = layer(x, geometry)[0]
        expected = attend_with_loops(layer, x, grid, geometry.window, geometry.shift, masked)
    real = (slice(None), slice(grid[0]), slice(grid[1]))  # what padded tokens see is of no use to anyone
    torch.testing.assert_close(ours[real], expected[real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("grid", "window"),
    [((14, 14), (7, 7)), ((24, 12), (12, 12)), ((10, 15), (4, 7)), ((5, 9), (7, 7)), ((6, 6), (6, 6))],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["padding-seen", "padding-masked"])
def test_sdpa_equals_eager_with_gradients(grid, window, masked):
    geometry = window_geometry(grid, window, True, shift_per_axis=True)
    eager = layer_of(window, "eager", masked).train()
    sdpa = layer_of(window, "sdpa", masked).train()
    sdpa.load_state_dict(eager.state_dict())
    x = torch.randn(2, *grid, 8)
    results = []
    for layer in (eager, sdpa):
        leaf = x.clone().requires_grad_()
        out = layer(pad_to_windows(leaf, geometry), geometry)[0][:, : grid[0], : grid[1]]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out, leaf.grad, *(parameter.grad for parameter in layer.parameters())))
    torch.testing.assert_close(results[1][0], results[0][0], **SAME_OUTPUT)
    for theirs, ours in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, **SAME_GRADIENT)


def test_probabilities_sum_to_one_and_masked_pairs_have_none(tiny_config):
    model = SwinHFModel(tiny_config).eval()
    attentions = model(torch.randn(2, 3, 32, 48), output_attentions=True).attentions
    assert [tuple(a.shape[1:]) for a in attentions] == [(2, 12, 12), (2, 12, 12), (4, 12, 12)]
    for probabilities in attentions:
        assert (probabilities >= 0).all()
        torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities[..., 0]))
    # Stage 2 ends with a shifted block, whose last window holds tokens of four corners of the image.
    corner = attentions[1][-1]  # h, N, N
    assert corner[:, 0, -1].max() < 1e-20 and corner[:, 0, 0].min() > 0


def test_attentions_need_no_other_backend(tiny_model):
    x = torch.randn(1, 3, 32, 48)
    tiny_model.set_attn_implementation("sdpa")
    with_sdpa = tiny_model(x, output_attentions=True)
    tiny_model.set_attn_implementation("eager")
    with_eager = tiny_model(x, output_attentions=True)
    assert len(with_sdpa.attentions) == 3
    for ours, theirs in zip(with_sdpa.attentions, with_eager.attentions, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_backends_change_in_place(tiny_model):
    assert tiny_model.config._attn_implementation == "sdpa"
    for backend in ("eager", "auto", "triton", "sdpa"):
        tiny_model.set_attn_implementation(backend)
        layers = [module for module in tiny_model.modules() if isinstance(module, SwinHFAttention)]
        assert {layer.config._attn_implementation for layer in layers} == {backend}


def test_unknown_backends_are_refused(tiny_model):
    with pytest.raises(ValueError, match="foo"):
        tiny_model.set_attn_implementation("foo")
    with pytest.raises(ValueError, match=r"flash_attention_2|Flash ?Attention"):
        SwinHFForImageClassification._from_config(tiny_model.config, attn_implementation="flash_attention_2")


def test_a_kernel_from_the_hub_is_refused(tiny_model):
    with pytest.raises(ValueError, match="attn_implementation 'someone/kernel' is refused; choose one of"):
        tiny_model.set_attn_implementation("someone/kernel")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the backend can run")
def test_a_backend_that_cannot_run_says_why(tiny_model):
    tiny_model.set_attn_implementation("triton")
    with pytest.raises(
        NotImplementedError, match=r"attn_implementation='triton' cannot run here: .*; use 'sdpa', or 'auto'"
    ):
        tiny_model(torch.randn(1, 3, 32, 48))
    tiny_model.set_attn_implementation("auto")
    assert tiny_model(torch.randn(1, 3, 32, 48)).logits.isfinite().all()


def test_a_function_of_the_user_attends(tiny_model):
    """What transformers' registry of attention functions holds is used by its name."""
    from transformers import AttentionInterface

    from swin_hf.model.attention import eager_attention

    seen = []

    def counted(module, query, key, value, attention_mask, **kwargs):
        seen.append(tuple(query.shape))
        return eager_attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("counted", counted)
    x = torch.randn(1, 3, 32, 48)
    expected = tiny_model(x).logits
    tiny_model.set_attn_implementation("counted")
    torch.testing.assert_close(tiny_model(x).logits, expected, **SAME_OUTPUT)
    assert len(seen) == 4


def test_a_new_table_is_seen_at_once(tiny_model):
    """Evaluation may keep sums of bias and mask; no way of changing a weight may leave an old one behind."""
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        before = tiny_model(x).logits
        tables = [p for name, p in tiny_model.named_parameters() if "bias_table" in name]
        for table in tables:
            table.add_(1.0)  # a constant vanishes in the softmax
        torch.testing.assert_close(tiny_model(x).logits, before, **SAME_OUTPUT)
        for table in tables:
            table.data[0] += 5.0
        assert not torch.allclose(tiny_model(x).logits, before, atol=1e-4)
