"""Every backend, and every shortcut that a CPU takes, computes what the definition computes, gradients included."""

import contextlib
import copy
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swin_hf import SwinHFConfig, SwinHFForImageClassification
from swin_hf.model import attention
from swin_hf.model.attention import BackendReport, backend_report, choose_backend, clear_caches, kept
from swin_hf.model.kernels_cpu import attend_here, in_parts, linear
from swin_hf.model.modeling_swin_hf import SwinHFAttention
from swin_hf.model.windows import shift_mask as make_shift_mask
from swin_hf.model.windows import window_geometry, window_mask

# fp32, two orders of summation: 1e-6 of a unit-scale activation, and ten times that on other processors.
OUTPUTS = {"rtol": 1e-5, "atol": 1e-5}
GRADIENTS = {"rtol": 1e-4, "atol": 1e-5}

# Twelve images of 24x16 tokens with a hidden layer of 64: nothing divides anything, and a stage needs several parts.
GEOMETRIES = {
    "w7x7-shifted-padded": ((16, 23), (7, 7), True),
    "w7x7-plain": ((14, 21), (7, 7), False),
    "w4x3-shifted": ((8, 9), (4, 3), True),
    "w12x12-shifted": ((24, 13), (12, 12), True),
    "w7x7-grid-smaller": ((5, 9), (7, 7), True),
}


@contextlib.contextmanager
def onednn_off():
    with warnings.catch_warnings():
        # flags() also sets what oneDNN does on Intel's GPUs, and then warns that there is none.
        warnings.filterwarnings("ignore", message="TF32 acceleration")
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    model(x).logits.square().sum().backward()
    return {"x": x.grad, **{name: parameter.grad.clone() for name, parameter in model.named_parameters()}}


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, gradient in theirs.items():
        scale = gradient.abs().max().clamp(min=1e-3)  # that of a bias under a softmax is zero, up to rounding
        torch.testing.assert_close(
            ours[name] / scale, gradient / scale, **GRADIENTS, msg=lambda text, name=name: name + text
        )


@pytest.fixture
def awkward_model(awkward_config: SwinHFConfig) -> SwinHFForImageClassification:
    torch.manual_seed(0)
    return SwinHFForImageClassification(awkward_config).eval()


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that only one or two tiny images fit."""
    monkeypatch.setattr("swin_hf.model.kernels_cpu.CACHED_BYTES", 2 * 16 * 24 * 64 * 4)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_sdpa_agrees_with_eager_in_outputs_and_gradients(name, dtype):
    grid, window, shifted = GEOMETRIES[name]
    geometry = window_geometry(grid, window, shifted)
    config = SwinHFConfig(embed_dim=16, num_heads=(2, 2, 2, 2), window_size=window)
    torch.manual_seed(0)
    x = torch.randn(2, *geometry.padded, 16, dtype=dtype)
    results = {}
    state = None
    for backend in ("eager", "sdpa"):
        config = copy.deepcopy(config)
        config._attn_implementation = backend
        layer = SwinHFAttention(config, 16, 2, window).to(dtype)
        nn.init.normal_(layer.relative_position_bias_table)
        state = state or copy.deepcopy(layer.state_dict())
        layer.load_state_dict(state)
        with torch.no_grad():
            without_graph = layer(x, geometry)[0]
        y = x.clone().requires_grad_()
        out = layer(y, geometry)[0]
        (out * torch.arange(16)).sum().backward()
        results[backend] = without_graph, out.detach(), {"x": y.grad} | {n: p.grad for n, p in layer.named_parameters()}
    for ours, theirs in zip(results["sdpa"][:2], results["eager"][:2], strict=True):
        torch.testing.assert_close(ours, theirs, **OUTPUTS)
    assert_same_gradients(results["sdpa"][2], results["eager"][2])


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_window_attention_differentiates_what_it_computes(shifted):
    geometry = window_geometry((4, 6), (2, 3), shifted)
    torch.manual_seed(0)
    qkv = [torch.randn(4, 2, 6, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bias = torch.randn(2, 6, 6, dtype=torch.float64, requires_grad=True)
    mask = make_shift_mask(geometry).double()[:, None] / 50 if shifted else None
    assert torch.autograd.gradcheck(lambda *given: attend_here(*given, mask, 0.5), (*qkv, bias))
    assert torch.autograd.gradgradcheck(lambda *given: attend_here(*given, mask, 0.5), (*qkv, bias))


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_every_part_of_a_large_batch_counts_in_the_gradients(shifted):
    """2,160 windows do not fit into the cache at once."""
    torch.manual_seed(0)
    layer = SwinHFAttention(SwinHFConfig(embed_dim=16, num_heads=(2, 2, 2, 2)), 16, 2, (4, 3))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    geometry = window_geometry((24, 36), layer.window, shifted)
    x, wanted = torch.randn(2, 30, 24, 36, 16)
    results = []
    for backend, dtype in (("sdpa", torch.float32), ("eager", torch.float64)):
        network = copy.deepcopy(layer).to(dtype)
        network.config._attn_implementation = backend
        given = x.detach().clone().to(dtype).requires_grad_()
        (network(given, geometry)[0] * wanted.to(dtype)).mean().backward()
        results.append({"x": given.grad.float()} | {n: p.grad.float() for n, p in network.named_parameters()})
    for name, gradient in results[1].items():
        distance = (results[0][name] - gradient).norm() / gradient.norm()
        assert distance < 1e-4, f"{name}: {distance:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["autocast", "model"])
def test_window_attention_of_16_bits_is_as_exact_as_the_definition(dtype, way, monkeypatch):
    """Both multiply in 16 bits; against float64, ours, whose softmax is in float32, is no further off."""
    torch.manual_seed(0)
    layer = SwinHFAttention(SwinHFConfig(embed_dim=16, num_heads=(2, 2, 2, 2)), 16, 2, (4, 3))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    geometry = window_geometry((8, 12), layer.window, True)
    x = torch.randn(2, 8, 12, 16, dtype=torch.float64)
    wanted = torch.randn(2, 8, 12, 16, dtype=torch.float64)

    def train(kind, ours):
        network = copy.deepcopy(layer).to(kind)
        network.config._attn_implementation = "sdpa" if ours else "eager"
        with torch.autocast("cpu", dtype, enabled=kind is torch.float32):
            out = network(x.to(kind), geometry)[0]
        (out * wanted.to(out.dtype)).sum().backward()
        gradients = {name: parameter.grad.double() for name, parameter in network.named_parameters()}
        return gradients | {"output": out.detach().double()}

    used = []
    monkeypatch.setattr(attention, "attend_here", lambda *given: used.append(1) or attend_here(*given))
    truth = train(torch.float64, ours=False)
    kind = dtype if way == "model" else torch.float32
    theirs = train(kind, ours=False)
    assert not used
    ours = train(kind, ours=True)
    assert used
    for name, value in truth.items():
        error = (ours[name] - value).norm() / value.norm()
        assert error <= 1.2 * (theirs[name] - value).norm() / value.norm() + 1e-4, name


@pytest.mark.parametrize("fixture", ["tiny_model", "awkward_model"])
def test_cpu_shortcuts_change_neither_outputs_nor_gradients(fixture, request, small_cache):
    model = request.getfixturevalue(fixture)
    definition = copy.deepcopy(model).double()
    definition.set_attn_implementation("eager")
    x = torch.randn(5, 3, 37, 50)
    with torch.no_grad():
        fast = model(x).logits
        with onednn_off():
            slow = model(x).logits
        exact = definition(x.double()).logits
    torch.testing.assert_close(fast, exact.float(), **OUTPUTS)
    torch.testing.assert_close(slow, exact.float(), **OUTPUTS)
    # Still in evaluation mode: stochastic depth would drop other branches in each.
    exact = {name: gradient.float() for name, gradient in gradients(definition, x.double()).items()}
    assert_same_gradients(gradients(model, x), exact)


def test_a_batch_is_its_images(tiny_model, small_cache):
    x = torch.randn(7, 3, 32, 48)
    with torch.no_grad():
        together = tiny_model(x).logits
        alone = torch.cat([tiny_model(image[None]).logits for image in x])
    torch.testing.assert_close(together, alone, **OUTPUTS)


class Sizes(nn.Module):
    """A stage that remembers how many images came at once."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, output_attentions=False):
        self.seen.append(len(x))
        return x, None


@torch.no_grad()
@pytest.mark.parametrize(
    ("fitting", "expected"),
    [(0, [1] * 32), (1, [1] * 32), (5, [5] * 6 + [2]), (12, [11, 11, 10]), (31, [16, 16]), (32, [32]), (99, [32])],
)
def test_a_batch_is_cut_into_equal_parts_of_at_least_one_image(fitting, expected, monkeypatch):
    stage, x = Sizes(), torch.randn(32, 8, 8, 2)
    monkeypatch.setattr("swin_hf.model.kernels_cpu.CACHED_BYTES", fitting * 8 * 8 * 4 * 4)
    assert torch.equal(in_parts(stage, x, 2.0)[0], x)
    assert stage.seen == expected


def test_a_hook_anywhere_sees_the_whole_batch(tiny_model, small_cache):
    seen = []
    tiny_model.swin.stages[0].blocks[0].mlp.fc1.register_forward_hook(lambda *args: seen.append(args[2].shape[0]))
    with torch.no_grad():
        tiny_model(torch.randn(5, 3, 32, 48))
    assert seen == [5]


def test_a_hook_on_an_activation_sees_it(tiny_model):
    seen = []
    tiny_model.swin.stages[0].blocks[0].mlp.act.register_forward_hook(lambda *args: seen.append(args[2].shape))
    with torch.no_grad():
        tiny_model(torch.randn(1, 3, 32, 48))
    assert seen == [(1, 16, 24, 64)]


def test_a_changed_forward_is_called(tiny_model):
    x = torch.randn(1, 3, 32, 48)
    fc2 = tiny_model.swin.stages[0].blocks[0].mlp.fc2
    with torch.no_grad():
        before = tiny_model(x).logits
        fc2.forward = lambda hidden: F.linear(hidden, fc2.weight * 2, fc2.bias)  # as accelerate's hooks do
        assert not torch.allclose(before, tiny_model(x).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["fp64", "bf16", "fp16"])
def test_other_dtypes_run_the_ordinary_way(tiny_model, dtype):
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        expected = tiny_model(x).logits
        actual = tiny_model.to(dtype)(x.to(dtype)).logits
    assert actual.dtype == dtype
    # bf16 keeps 8 bits of each of some 40 results in a row.
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol={torch.bfloat16: 3e-2}.get(dtype, 4e-3))


def test_autocast_computes_in_its_dtype(tiny_model):
    seen = []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        layer = tiny_model.swin.stages[0].blocks[0].mlp.fc1
        seen.append(linear(layer, torch.randn(2, 16)).dtype)
    assert seen == [torch.bfloat16]


def test_function_transforms_go_through(tiny_model):
    x = torch.randn(2, 3, 32, 48)
    parameters = dict(tiny_model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(tiny_model, parameters, (x,)).logits.square().sum()

    ours = torch.func.grad(loss)(parameters)
    expected = gradients(tiny_model, x)
    assert_same_gradients(ours, {name: expected[name] for name in ours})


def through_both_backends(model, function):
    """What a function of the model returns with ``sdpa`` and with ``eager`` without shortcuts."""
    results = []
    for backend, shortcuts in (("sdpa", contextlib.nullcontext()), ("eager", onednn_off())):
        model.set_attn_implementation(backend)
        with shortcuts:
            results.append(function(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own forward mode uses it
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_forward_mode_keeps_its_tangents(tiny_model, grad):
    x, direction = torch.randn(2, 2, 3, 32, 48)

    def tangent(model):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction)).logits).tangent.detach()

    through_both_backends(tiny_model, tangent)


def test_many_gradients_at_once(tiny_model):
    x = torch.randn(1, 3, 32, 48, requires_grad=True)

    def jacobian(model):
        logits = model(x).logits[0]
        return torch.autograd.grad(logits, x, torch.eye(len(logits)), is_grads_batched=True)[0]

    through_both_backends(tiny_model, jacobian)


def test_second_derivatives_of_the_tables_alone(tiny_model):
    x = torch.randn(2, 3, 32, 48)
    tables = [p.requires_grad_("bias_table" in n) for n, p in tiny_model.named_parameters() if "bias_table" in n]
    for parameter in set(tiny_model.parameters()) - set(tables):
        parameter.requires_grad_(False)

    def twice(model):
        first = torch.autograd.grad(model(x).logits.square().sum(), tables, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tables)

    through_both_backends(tiny_model, twice)


def test_an_ensemble_goes_through_vmap(tiny_model):
    x = torch.randn(2, 3, 32, 48)
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)

    def logits(model):
        model.requires_grad_()
        stacked, buffers = torch.func.stack_module_state([model, other])

        def call(parameters, buffers):
            return torch.func.functional_call(model, (parameters, buffers), (x,)).logits

        return torch.func.vmap(call)(stacked, buffers).detach()

    through_both_backends(tiny_model, logits)


def test_functionalize_leaves_nothing_behind(tiny_model):
    x = torch.randn(2, 3, 32, 48)
    clear_caches()
    with torch.no_grad():
        functional = torch.func.functionalize(lambda x: tiny_model(x).logits)(x)
        torch.testing.assert_close(tiny_model(x).logits, functional, **OUTPUTS)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_an_empty_batch_has_empty_logits(tiny_model, backend, grad):
    tiny_model.set_attn_implementation(backend)
    with torch.set_grad_enabled(grad):
        logits = tiny_model(torch.randn(0, 3, 32, 48)).logits
    assert logits.shape == (0, tiny_model.config.num_labels)
    if grad:
        logits.sum().backward()
        assert all(not p.grad.any() for p in tiny_model.parameters() if p.grad is not None)


def test_the_default_device_does_not_matter(tiny_model):
    x = torch.randn(2, 3, 32, 48)
    torch.set_default_device("meta")
    try:
        tiny_model(x).logits.square().sum().backward()
    finally:
        torch.set_default_device(None)
    assert all(p.grad.device.type == "cpu" for p in tiny_model.parameters() if p.grad is not None)


def test_a_function_that_writes_into_its_mask_spoils_nothing(tiny_model):
    def careless(module, query, key, value, mask, scaling, dropout=0.0, **_):
        mask[..., 0] += 3
        return attention.eager_attention(module, query, key, value, mask, scaling, dropout)

    x = torch.randn(2, 3, 32, 48)
    ALL_ATTENTION_FUNCTIONS.register("careless", careless)
    try:
        with torch.no_grad():
            before = tiny_model(x).logits
            tiny_model.set_attn_implementation("careless")
            assert not torch.allclose(tiny_model(x).logits, before)
            tiny_model.set_attn_implementation("sdpa")
            torch.testing.assert_close(tiny_model(x).logits, before)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("careless")


@pytest.mark.parametrize("distinct", [False, True], ids=["one bias", "a bias for each"])
def test_windows_in_parts_are_all_windows(distinct):
    query, key, value = torch.randn(3, 10, 2, 12, 8)
    bias = torch.randn(10 if distinct else 1, 2, 12, 12)
    layer = SwinHFAttention(SwinHFConfig(), 16, 2, (4, 3)).eval()
    sdpa = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    whole = attention.eager_attention(layer, query, key, value, bias, layer.scaling)[0]
    for size in (3, 5, 10):
        parts = attention.attend_in_parts(sdpa, layer, query, key, value, bias, size)
        torch.testing.assert_close(parts, whole, **OUTPUTS)


def test_flops_are_counted(tiny_model):
    layer = tiny_model.classifier
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear(layer, torch.randn(3, layer.in_features))
    assert counter.get_total_flops() == 2 * 3 * layer.in_features * layer.out_features


@pytest.mark.parametrize("write", ["in-place", "through .data", "a new parameter"])
def test_a_cached_bias_is_never_stale(tiny_model, write):
    x = torch.randn(2, 3, 32, 48)
    layer = tiny_model.swin.stages[1].blocks[1].attention
    with torch.no_grad():
        before = tiny_model(x).logits
        table = torch.randn_like(layer.relative_position_bias_table)
        if write == "in-place":
            layer.relative_position_bias_table.copy_(table)
        elif write == "through .data":
            layer.relative_position_bias_table.data.copy_(table)
        else:
            layer.relative_position_bias_table = nn.Parameter(table)
        after = tiny_model(x).logits
        tiny_model.set_attn_implementation("eager")
        with torch.enable_grad():  # computes the bias afresh
            expected = tiny_model(x).logits.detach()
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, **OUTPUTS)


def test_a_cached_bias_is_that_of_its_padding(awkward_model):
    """The same table, with and without the tokens outside of the picture."""
    x = torch.randn(2, 3, 30, 46)
    logits = []
    with torch.no_grad():
        for masked in (False, True, False):
            awkward_model.config.mask_padding = masked
            logits.append(awkward_model(x).logits)
            with torch.enable_grad():  # computes the bias afresh
                torch.testing.assert_close(logits[-1], awkward_model(x).logits.detach(), **OUTPUTS)
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)


def test_the_bias_cache_is_bounded():
    cache, computed = attention.BiasCache(capacity=1000), []

    def look_up(key, size=100):
        table = torch.full((3,), float(size))
        return cache.look_up(key, table, lambda: computed.append(key) or torch.zeros(size))

    for key in (1, 2, 1, 2):  # 400 bytes each
        look_up(key)
    assert computed == [1, 2] and cache.size == 800
    look_up(3)
    assert cache.size == 400  # begun anew
    look_up(1)
    look_up(4, size=1000)  # larger than all that may be kept
    assert computed == [1, 2, 3, 1, 4] and cache.size == 800
    cache.clear()
    look_up(1)
    assert computed[-1] == 1 and cache.size == 400


def test_inference_mode_leaves_nothing_that_a_training_step_trips_over(tiny_model):
    x = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        tiny_model(x)
    with torch.no_grad():
        tiny_model(x)
    gradients(tiny_model.train(), x)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in tiny_model.parameters())


def test_frozen_tables_train_the_rest(tiny_model):
    for name, parameter in tiny_model.named_parameters():
        parameter.requires_grad_("bias_table" not in name)
    x = torch.randn(2, 3, 32, 48)
    tiny_model(x).logits.square().sum().backward()
    ours = {n: p.grad.clone() for n, p in tiny_model.named_parameters() if p.grad is not None}
    tiny_model.set_attn_implementation("eager")
    tiny_model.zero_grad()
    with onednn_off():
        tiny_model(x).logits.square().sum().backward()
    assert_same_gradients(ours, {n: p.grad for n, p in tiny_model.named_parameters() if p.grad is not None})


def test_masks_have_no_gradient_and_are_shared_between_calls():
    geometry = window_geometry((8, 9), (4, 3), True)
    sizes, like = (geometry, False, torch.float32, torch.device("cpu")), torch.empty(0)
    assert torch.equal(kept(window_mask, *sizes, like=like), window_mask(*sizes))
    assert kept(window_mask, *sizes, like=like).data_ptr() == kept(window_mask, *sizes, like=like).data_ptr()


def test_asking_for_triton_where_it_cannot_run_says_why(tiny_model):
    tiny_model.set_attn_implementation("triton")
    with pytest.raises(NotImplementedError, match=r"cannot run here: .*(cpu|triton).*use 'sdpa', or 'auto'"):
        tiny_model(torch.randn(1, 3, 32, 48))
    with pytest.raises(NotImplementedError, match="cannot run here"):
        backend_report(tiny_model)


def test_auto_falls_back_to_sdpa_and_says_so_once(tiny_model, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("swin_hf.model.attention"), "propagate", True)
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    tiny_model.set_attn_implementation("auto")
    sdpa = copy.deepcopy(tiny_model)
    sdpa.set_attn_implementation("sdpa")
    x = torch.randn(1, 3, 32, 48)
    logging.info_once.cache_clear()
    with caplog.at_level("INFO", logger="swin_hf.model.attention"), torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(tiny_model(x).logits, sdpa(x).logits)
    said = [record.message for record in caplog.records if "not triton" in record.message]
    # Heads of 8 channels are one objection, the device is another; stages with other heads may add one line.
    assert said and len(said) == len(set(said))
    assert all("attention backend sdpa (attn_implementation='auto')" in message for message in said)


def test_the_default_says_once_that_a_gpu_could_run_the_kernel(tiny_config, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("swin_hf.model.attention"), "propagate", True)
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(attention, "reasons_against_triton", lambda *_: [])
    clear_caches()
    logging.warning_once.cache_clear()
    tiny_config._attn_implementation = "sdpa"
    for _ in range(3):
        assert choose_backend(tiny_config, torch.device("cuda"), torch.bfloat16, 32, 0.0, (7, 7)) == "sdpa"
    assert choose_backend(tiny_config, torch.device("cpu"), torch.bfloat16, 32, 0.0, (7, 7)) == "sdpa"
    assert [record.message for record in caplog.records if "triton" in record.message] == [
        "attention backend sdpa (attn_implementation='sdpa'); not triton: the faster kernel could run here; "
        "set attn_implementation='auto'"
    ]
    clear_caches()


def test_report_names_the_backend_and_the_reasons(tiny_model):
    report = backend_report(tiny_model)
    assert isinstance(report, BackendReport)
    assert (report.requested, report.backend) == ("sdpa", "sdpa")
    assert report.reasons["triton"]
    tiny_model.set_attn_implementation("eager")
    report = backend_report(tiny_model)
    assert report.backend == "eager" and set(report.reasons) == {"triton", "sdpa"}
    assert "not sdpa: 'eager' was asked for" in str(report)
    with pytest.raises(TypeError, match=r"Linear has no window attention.*swin_hf"):
        backend_report(nn.Linear(2, 2))


def test_an_unsupported_dtype_or_head_is_a_reason(tiny_config):
    tiny_config._attn_implementation = "triton"
    with pytest.raises(NotImplementedError, match="float64"):
        choose_backend(tiny_config, torch.device("cpu"), torch.float64, 24, 0.0, (7, 7))
    tiny_config._attn_implementation = "auto"
    assert choose_backend(tiny_config, torch.device("cpu"), torch.float64, 24, 0.0, (7, 7)) == "sdpa"


@pytest.mark.slow
@pytest.mark.timeout(7200)  # a compiler on a loaded machine
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiled_model_is_one_graph_and_agrees(tiny_model, training):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 32, 48)
    compiled = torch.compile(tiny_model, fullgraph=True)
    if training:
        ours = gradients(compiled, x)
        assert_same_gradients(
            {name.removeprefix("_orig_mod."): gradient for name, gradient in ours.items()}, gradients(tiny_model, x)
        )
        return
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).logits, tiny_model(x).logits, **OUTPUTS)


@pytest.mark.slow
def test_exported_graph_has_no_operator_of_ours(tiny_model):
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        program = torch.export.export(tiny_model, (x,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith(("aten.", "<built-in", "<function")) for target in targets), targets


@pytest.mark.slow
def test_processors_without_onednn_compute_the_same():
    code = """
import platform; platform.machine = lambda: "riscv64"
import torch
from swin_hf import SwinHFConfig, SwinHFForImageClassification
from swin_hf.model import kernels_cpu
assert kernels_cpu._ONEDNN is None
torch.manual_seed(0)
model = SwinHFForImageClassification(SwinHFConfig(image_size=32, patch_size=2, embed_dim=16, depths=(1, 2, 1),
    num_heads=(2, 2, 4), window_size=(4, 3), encoder_stride=8)).eval()
print(model(torch.ones(1, 3, 32, 48)).logits.sum().item())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch.manual_seed(0)
    config = SwinHFConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=(1, 2, 1), num_heads=(2, 2, 4), window_size=(4, 3),
        encoder_stride=8,
    )  # fmt: skip
    model = SwinHFForImageClassification(config).eval()
    assert float(run.stdout) == pytest.approx(model(torch.ones(1, 3, 32, 48)).logits.sum().item(), abs=1e-5)


def test_a_layer_without_weights_is_simply_called():
    """Quantised layers keep their weights under other names; the benchmark takes the layers out."""
    x = torch.randn(2, 3)
    with torch.no_grad():
        assert linear(nn.Identity(), x) is x
        assert torch.equal(linear(nn.Identity(), x, nn.ReLU()), x.relu())
