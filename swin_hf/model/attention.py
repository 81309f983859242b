"""Window attention, W-MSA and SW-MSA of section 3.2: the plain definition, and the choice of who computes it.

``eager`` is the definition; every other backend agrees with it in outputs and gradients. A backend that is asked
for by name runs or raises with its reasons; ``auto`` takes the first that has none.

Shape legend:
    B batch, Hp and Wp height and width of a padded map in tokens, C channels,
    nW windows of a map, N tokens of a window, h heads, d channels of a head (C = h * d).
"""

import platform
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .attention_triton import reasons_against_triton, triton_window_attention
from .configuration_swin_hf import SwinHFConfig
from .windows import (
    Pair,
    WindowGeometry,
    bias_index,
    cyclic_shift,
    window_mask,
    window_order,
    window_partition,
    window_reverse,
)

BACKENDS = ("eager", "sdpa", "triton", "auto")  # slowest first
UNASKED = "attn_implementation is {!r}; 'auto' would take it"
# Windows that torch's fused attention takes in one call on a GPU: a limit of the launch (pytorch#142228).
SDPA_WINDOWS = 65_535

logger = logging.get_logger(__name__)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """``SoftMax(Q K^T / sqrt(d) + B) V``, equation 4 of the paper, written down as it stands.

    Args:
        module: The attention layer, for the signature of transformers' attention functions.
        query: ``(B * nW, h, N, d)``; ``key`` and ``value`` alike.
        key: See ``query``.
        value: See ``query``.
        attention_mask: Bias and mask, added to the scores; broadcasts to ``(B * nW, h, N, N)``.
        scaling: ``1 / sqrt(d)``.
        dropout: Probability of dropping an attention probability.

    Returns:
        The attended values ``(B * nW, N, h, d)`` and the probabilities ``(B * nW, h, N, N)``.
    """
    scores = (query * scaling) @ key.transpose(-2, -1)  # B * nW, h, N, N
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(dim=-1)
    probabilities = nn.functional.dropout(probabilities, dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2), probabilities


class BackendReport(NamedTuple):
    """Which backend attends, and why no faster one does; ``str()`` says it in one line."""

    requested: str  # attn_implementation of the configuration
    backend: str  # what runs; of several stages, the slowest
    reasons: dict[str, list[str]]  # against each faster backend, the fastest first

    def __str__(self) -> str:
        against = "".join(f"; not {name}: {', '.join(reasons)}" for name, reasons in self.reasons.items())
        return f"attention backend {self.backend} (attn_implementation={self.requested!r}){against}"


def choose_backend(
    config: SwinHFConfig, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, window: Pair
) -> str:
    """Name of the backend that attends: the one that was asked for, or the first without objections.

    Args:
        config: Configuration of the model; its ``attn_implementation`` is what was asked for.
        device: Where the map is.
        dtype: Type of the map.
        head_dim: Channels of a head, d.
        dropout: Probability of dropping an attention probability in this call.
        window: Window that attends.

    Raises:
        NotImplementedError: If a backend was asked for by name and cannot run; the message gives every reason.
    """
    wanted = config._attn_implementation or "sdpa"
    if wanted not in ("triton", "auto"):
        if wanted == "sdpa" and device.type == "cuda" and not torch.compiler.is_compiling():
            _point_at_triton(device, dtype, head_dim, dropout, window)
        return wanted
    reasons = reasons_against_triton(device, dtype, head_dim, dropout, window)
    if not reasons:
        return "triton"
    if wanted == "auto":
        if not torch.compiler.is_compiling():
            # On a GPU that could run the kernel, a user loses time; elsewhere there is nothing to lose.
            say = logger.warning_once if device.type == "cuda" else logger.info_once
            say(str(BackendReport(wanted, "sdpa", {"triton": reasons})))
        return "sdpa"
    raise NotImplementedError(
        f"attn_implementation='triton' cannot run here: {'; '.join(reasons)}; use 'sdpa', or 'auto' to let it choose"
    )


@lru_cache(maxsize=64)
def _point_at_triton(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, window: Pair) -> None:
    """Say once that the default leaves the kernel unused on a GPU that could run it."""
    if not reasons_against_triton(device, dtype, head_dim, dropout, window):
        logger.warning_once(str(BackendReport("sdpa", "sdpa", {"triton": [UNASKED.format("sdpa")]})))


def backend_report(model: nn.Module) -> BackendReport:
    """Say which backend attends in a model as it is now: its device, dtype, mode and sizes.

    Args:
        model: A model of this family.

    Raises:
        TypeError: If the model is of another family.
        NotImplementedError: If a backend was asked for by name and cannot run; the message gives every reason.
    """
    layers = [module for module in model.modules() if isinstance(module, SwinHFAttention)]
    if not layers:
        raise TypeError(f"{type(model).__name__} has no window attention; give a model of swin_hf")
    backends, objections = [], []
    for layer in layers:
        weight = layer.qkv.weight
        dropout = layer.dropout if layer.training else 0.0
        circumstances = weight.device, weight.dtype, layer.head_dim, dropout, layer.window
        backends.append(choose_backend(layer.config, *circumstances))
        objections += reasons_against_triton(*circumstances)
    requested = layers[0].config._attn_implementation or "sdpa"
    backend = min(backends, key=lambda name: BACKENDS.index(name) if name in BACKENDS else -1)
    reasons = {}
    if backend != "triton":
        reasons["triton"] = list(dict.fromkeys(objections)) or [UNASKED.format(requested)]
    if backend == "eager":
        reasons["sdpa"] = [f"{requested!r} was asked for"]
    return BackendReport(requested, backend, reasons)


class SwinHFAttention(nn.Module):
    """Multi-head self-attention within windows, with a relative position bias.

    Args:
        config: Configuration of the model.
        dim: Channels, C.
        num_heads: Heads, h.
        window: Window that the bias table is made for.
    """

    def __init__(self, config: SwinHFConfig, dim: int, num_heads: int, window: Pair) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.window = window
        self.head_dim = dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim)
        table_rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(table_rows, num_heads))

    def forward(
        self, x: Tensor, geometry: WindowGeometry, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within each window of a padded map.

        Args:
            x: Padded map, ``(B, Hp, Wp, C)``.
            geometry: How the map is cut.
            output_attentions: Whether to return the probabilities as well; the definition then computes them.

        Returns:
            The map ``(B, Hp, Wp, C)``, and probabilities ``(B * nW, h, N, N)`` or None.
        """
        dropout = self.dropout if self.training else 0.0
        backend = (
            "eager"
            if output_attentions
            else choose_backend(self.config, x.device, x.dtype, self.head_dim, dropout, geometry.window)
        )
        if backend == "triton":
            x = triton_window_attention(
                self.qkv(x),
                self.relative_position_bias_table,
                self.window,
                geometry,
                self.num_heads,
                self.scaling,
                self.config.mask_padding,
            )
            return self.proj(x), None

        # With a gradient, its way back would be a scatter, which is slow.
        gathers = geometry.is_shifted and in_plain_evaluation(x) and x.numel() > 0
        if gathers:
            order, back = window_order(geometry, x.device)
            windows = x.flatten(1, 2).index_select(1, order).view(-1, geometry.area, x.shape[-1])  # B * nW, N, C
        else:
            windows = window_partition(cyclic_shift(x, geometry.shift), geometry.window)  # B * nW, N, C
        qkv = linear(self.qkv, windows).unflatten(-1, (3, self.num_heads, -1))  # B * nW, N, 3, h, d
        windows, probabilities = self._attend(qkv, geometry, backend, dropout)  # B * nW, N, h, d
        if is_exporting():  # for ONNX, sdpa becomes products of another layout: no flat view
            windows = windows.clone(memory_format=torch.contiguous_format)
        windows = linear(self.proj, windows.flatten(-2))  # B * nW, N, C
        if gathers:
            x = windows.view(x.shape[0], -1, windows.shape[-1]).index_select(1, back).view(*x.shape[:3], -1)  # as x
        else:
            x = window_reverse(windows, geometry.window, geometry.padded)  # B, Hp, Wp, C
            x = cyclic_shift(x, (-geometry.shift[0], -geometry.shift[1]))
        return x, probabilities if output_attentions else None

    def _attend(
        self, qkv: Tensor, geometry: WindowGeometry, backend: str, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """Values ``(B * nW, N, h, d)`` and, where the backend has them, probabilities ``(B * nW, h, N, N)``."""
        if backend == "sdpa" and dropout == 0 and attends_itself(qkv, self.relative_position_bias_table):
            bias = self.relative_position_bias(geometry.window)[0]  # h, N, N
            mask = window_mask(qkv, geometry, self.config.mask_padding)  # nW, 1, N, N
            return WindowAttention.apply(qkv, bias, mask, self.scaling), None
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B * nW, h, N, d each
        if backend == "sdpa" and fails_in_sdpa(query):
            backend = "eager"
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            backend, eager_attention
        )
        # A function that somebody registered may write into its mask.
        bias = self.additive_mask(query, geometry, may_keep=backend in BACKENDS)
        if backend == "sdpa" and query.is_cuda and query.shape[0] > SDPA_WINDOWS:
            return attend_in_parts(attend, self, query, key, value, bias, SDPA_WINDOWS, dropout), None
        return attend(self, query, key, value, bias, scaling=self.scaling, dropout=dropout)

    def relative_position_bias(self, window: Pair) -> Tensor:
        """The bias of every pair of tokens of a window, ``(1, h, N, N)``."""
        table = self.relative_position_bias_table
        index = bias_index(table, window, self.window)
        return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).unsqueeze(0)

    def additive_mask(self, query: Tensor, geometry: WindowGeometry, may_keep: bool = True) -> Tensor:
        """Bias and mask together: ``(1, h, N, N)``, or ``(B * nW, h, N, N)`` where windows differ."""
        table = self.relative_position_bias_table
        if may_keep and in_plain_evaluation(table):
            key = (table.data_ptr(), self.window, geometry, self.config.mask_padding, query.dtype)
            bias = _BIASES.look_up(key, table, lambda: self._bias_and_mask(query, geometry))
        else:
            bias = self._bias_and_mask(query, geometry)
        return bias if len(bias) == 1 else bias.repeat(query.shape[0] // len(bias), 1, 1, 1)

    def _bias_and_mask(self, query: Tensor, geometry: WindowGeometry) -> Tensor:
        """``(1, h, N, N)``, or ``(nW, h, N, N)`` where windows differ."""
        bias = self.relative_position_bias(geometry.window).to(query.dtype)
        mask = window_mask(query, geometry, self.config.mask_padding)  # nW, 1, N, N
        return (bias if mask is None else bias + mask).contiguous()

    def extra_repr(self) -> str:
        """What ``print(model)`` says of this layer."""
        return f"num_heads={self.num_heads}, window={self.window[0]}x{self.window[1]}"


class _BiasCache:
    """Sums of bias and mask that evaluation need not compute again.

    An entry is valid as long as the table has the values that it was made from, and those are compared on every call:
    it cannot become stale, whichever way a weight is changed, and no model holds it. The tables are small, so that
    the comparison costs microseconds.

    Args:
        capacity: Bytes of all entries together; when they are exceeded, the cache begins anew.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self.entries: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def look_up(self, key: Hashable, table: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` returned for a table of these values, or returns now."""
        known = self.entries.get(key)
        if known is not None and torch.equal(known[0], table):
            return known[1]
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve a training step
            made_from, bias = table.detach().clone(), compute()
        if bias.nbytes <= self.capacity:
            self.size += bias.nbytes if known is None else 0
            if self.size > self.capacity:
                self.entries, self.size = {}, bias.nbytes
            self.entries[key] = made_from, bias
        return bias


# Swin-B at 384 pixels with windows of 12 needs 80 MiB; Swin-T at 224 pixels 6.
_BIASES = _BiasCache(128 * 2**20)


# The same arithmetic in less time on a CPU: nothing here changes a result by more than rounding.
#
# Three things that a profile shows, each with its answer (docs/speed.md has the result):
#
# - ``nn.Linear`` leaves float32 products to the BLAS library of the build. oneDNN, which comes with torch as well, is
#   8 to 30 % faster at Swin's shapes and applies GELU on the way: `linear`.
# - The allocator maps every tensor over 32 MiB afresh, and first touching it costs four times the copy. A few images at
#   a time stay in the cache and in recycled memory: `images_at_once`.
# - ``scaled_dot_product_attention`` has no kernel for a bias that learns, and falls back to a dozen passes over the
#   scores: `WindowAttention` has a backward of its own.
#
# Whatever is not a plain float32 tensor in a plain layer takes the ordinary way: compilers and exporters, autocast,
# ``torch.func``, adapters, quantised or sharded weights, layers with hooks.
# ``torch.backends.mkldnn.flags(False)`` turns oneDNN off here as everywhere in torch.

# Hidden layer of an MLP that is worth having at once, in bytes: of 4, 8, 16 MiB and no limit, the fastest.
CACHED_BYTES = 16 * 2**20
# Queries, keys and values that :class:`WindowAttention` takes at once: of 1, 2, 4, 8 MiB and no limit, the fastest.
ATTENDED_BYTES = 2 * 2**20

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# A namespace of its own for each copy of this file: a model that came with its code must not take over the operator
# of an installed package.
_NAMESPACE = __name__.replace(".", "_")


def _find_onednn() -> Any:
    """The operator of oneDNN for a linear layer and its activation, or None where torch has none worth using."""
    # Elsewhere than on x86, oneDNN is built on other libraries; nobody has measured it.
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:  # a build of torch without it
        return None


_ONEDNN = _find_onednn()


def linear(layer: nn.Linear, x: Tensor, activation: nn.Module | None = None) -> Tensor:
    """Apply a linear layer and its activation, ``(..., C_in)`` to ``(..., C_out)``, the fastest way that is exact."""
    y: Tensor
    if _ONEDNN is None or not _is_bare(layer):  # a wrapper or a quantised layer may have no weight
        y = layer(x)
        return y if activation is None else activation(y)
    weight, bias = layer.weight, layer.bias
    gelu = type(activation) is GELUActivation and _is_bare(activation)
    if torch.compiler.is_compiling():
        if _may_be_opaque(x, weight):
            y = _compiled_linear(x, weight, bias, gelu)
            return y if gelu or activation is None else activation(y)
        y = layer(x)
    elif not (_is_plain(x, weight, *(() if bias is None else (bias,))) and torch.backends.mkldnn.enabled):
        y = layer(x)
    elif torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = _Linear.apply(x, weight, bias)
    else:
        y = _onednn_linear(x, weight, bias, gelu)
        return y if gelu or activation is None else activation(y)
    return y if activation is None else activation(y)


def images_at_once(x: Tensor, width: int, module: nn.Module) -> int:
    """How many images of a batch should go through ``module`` together, at least 1 and at most all.

    Images do not depend on each other, so that the parts of a batch, one after the other, are the batch. Only hooks
    could tell the difference: with one anywhere in the module, it stays whole.

    Args:
        x: Map, ``(B, H, W, C)``.
        width: Channels of the widest layer.
        module: What they go through.
    """
    batch, height, columns, _ = x.shape
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch._C._get_tracing_state() is not None:
        return batch
    fitting = max(1, CACHED_BYTES // (height * columns * width * x.element_size()))
    if batch <= fitting or type(x) is not Tensor or _has_any_global_hook() or any(map(_has_hooks, module.modules())):
        return batch
    parts = -(-batch // fitting)
    return -(-batch // parts)  # equal parts


def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which Dynamo of torch 2.11 takes to be true in every compilation."""
    return bool(torch.compiler._is_exporting_flag)


def in_plain_evaluation(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor on a CPU and what is computed from it has no gradient."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and _is_plain(x, dtypes=FLOATS)


def attends_itself(qkv: Tensor, bias: Tensor) -> bool:
    """Whether :class:`WindowAttention` should do what ``scaled_dot_product_attention`` does slowly here."""
    return (
        torch.is_grad_enabled()
        and bias.requires_grad
        and not torch.compiler.is_compiling()
        and _is_plain(qkv, bias, dtypes=FLOATS, autocast=True)
    )


def fails_in_sdpa(query: Tensor) -> bool:
    """Whether ``scaled_dot_product_attention`` cannot do what the definition can.

    It refuses empty batches, has no forward-mode derivative, and under ``torch.func`` does not see that the bias
    learns, so that it takes a kernel that cannot be differentiated.
    """
    if torch.compiler.is_compiling():
        return False
    transformed = torch.is_grad_enabled() and torch._C._are_functorch_transforms_active()
    return query.numel() == 0 or transformed or forward_ad._current_level >= 0


def attend_in_parts(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    module: SwinHFAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    size: int,
    dropout: float = 0.0,
) -> Tensor:
    """Attend for ``size`` windows at a time; arguments and result as of :func:`eager_attention`."""
    parts = []
    for start in range(0, query.shape[0], size):
        part = slice(start, start + size)
        added = bias if bias.shape[0] == 1 else bias[part]
        tensors = (query[part], key[part], value[part], added)
        parts.append(attend(module, *tensors, scaling=module.scaling, dropout=dropout)[0])
    return torch.cat(parts)


class WindowAttention(Function):
    """``SoftMax(Q K^T scaling + bias + mask) V`` with a backward of five passes over the scores instead of a dozen.

    Queries and keys of 16 bits are attended with in float32, as ``scaled_dot_product_attention`` does.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attend within windows.

        Args:
            ctx: Where the backward finds what it needs.
            qkv: ``(B * nW, N, 3, h, d)``.
            bias: ``(h, N, N)``.
            mask: ``(nW, 1, N, N)`` or None; has no gradient.
            scaling: ``1 / sqrt(d)``.

        Returns:
            ``(B * nW, N, h, d)``.
        """
        (count, tokens, _, heads, dim), wide = qkv.shape, _wide(qkv)
        added = bias if mask is None else bias + mask  # h, N, N, or nW, h, N, N
        out = qkv.new_empty(count, tokens, heads, dim)
        probabilities = qkv.new_empty(count, heads, tokens, tokens, dtype=wide)
        ctx.parts = _parts(qkv, mask)
        with _without_autocast():
            for part in ctx.parts:
                query, key, value = _by_head(qkv[part])  # B * nW * h, N, d each
                scores = probabilities[part].flatten(0, 1)  # B * nW * h, N, N
                torch.bmm(query.mul_(scaling), key.transpose(1, 2), out=scores)
                scores.view(-1, *added.shape).add_(added)
                torch.softmax(scores, -1, out=scores)
                out[part] = _by_token(torch.bmm(scores, value), heads)
        ctx.save_for_backward(qkv, bias, mask, probabilities)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate with respect to ``qkv`` and ``bias``."""
        qkv, bias, mask, probabilities = ctx.saved_tensors
        scaling = ctx.scaling
        # A second derivative is wanted, or vmap holds many gradients at once: differentiate the definition.
        again = torch.is_grad_enabled()
        if again or _is_batched(grad):
            wanted = [tensor for tensor, needed in zip((qkv, bias), ctx.needs_input_grad, strict=False) if needed]
            with torch.enable_grad():
                out = _define(qkv, bias, mask, scaling)
            grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
            return (*(next(grads) if needed else None for needed in ctx.needs_input_grad[:2]), None, None)
        heads = qkv.shape[3]
        grad_qkv = torch.empty_like(qkv)
        grad_bias = bias.new_zeros(bias.shape, dtype=probabilities.dtype)
        with _without_autocast():
            for part in ctx.parts:
                query, key, value = _by_head(qkv[part])  # B * nW * h, N, d each
                shares = probabilities[part].flatten(0, 1)  # B * nW * h, N, N
                grad_out = grad[part].transpose(1, 2).to(value.dtype, memory_format=torch.contiguous_format)
                grad_out = grad_out.reshape(value.shape)
                grad_scores = torch.bmm(grad_out, value.transpose(1, 2))
                grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, shares, -1, shares.dtype)
                grad_part = grad_qkv[part].unbind(2)  # B * nW, N, h, d each
                grad_part[0].copy_(_by_token(torch.bmm(grad_scores, key).mul_(scaling), heads))
                grad_part[1].copy_(_by_token(torch.bmm(grad_scores.transpose(1, 2), query).mul_(scaling), heads))
                grad_part[2].copy_(_by_token(torch.bmm(shares.transpose(1, 2), grad_out), heads))
                grad_bias += grad_scores.view(-1, *bias.shape).sum(0)
        return grad_qkv, grad_bias.to(bias.dtype), None, None


class _Linear(Function):
    """A linear layer whose products with the weight are computed by oneDNN, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As nn.Linear, keep what a gradient needs: a frozen layer keeps no activations.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shape, ctx.has_bias = x.shape, bias is not None
        return _onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        if torch.is_grad_enabled():  # a second derivative is wanted: oneDNN's operator has none
            grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        else:
            grad_x = _onednn_linear(rows, weight.t(), None).view(ctx.shape) if ctx.needs_input_grad[0] else None
        # Here the BLAS library is as fast, and its result lies as the parameter does.
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Multiply with oneDNN; GELU is the exact one, with erf."""
    y: Tensor = _ONEDNN(x, weight, bias, *(("gelu", [], "none") if gelu else ("none", [], "")))
    return y


@torch.library.custom_op(f"{_NAMESPACE}::linear", mutates_args=())
def _compiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """What :func:`linear` computes without gradients, as one operator that a compiler calls and does not look into."""
    return _onednn_linear(x, weight, bias, gelu)


@_compiled_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _may_be_opaque(x: Tensor, weight: Tensor) -> bool:
    """Whether a graph with our operator in it is right: not one for export or for autograd, nor for other devices."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not is_exporting()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )


def _is_plain(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,), autocast: bool = False) -> bool:
    """Whether these are ordinary dense tensors on a CPU, and nobody is watching what is done with them.

    With ``autocast``, the caller sees to the types under autocast itself.
    """
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu or tensor.dtype not in dtypes:
            return False
    return not (
        (torch.is_autocast_enabled("cpu") and not autocast)
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or torch._C._len_torch_dispatch_stack()  # fake tensors, proxies of an exporter, counters of operations
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # dual numbers: our operators would drop the tangents
    )


def _is_bare(layer: nn.Module) -> bool:
    """Whether calling a layer would do no more than its own ``forward``: no adapter, no hook, no wrapper."""
    return (
        type(layer) in (nn.Linear, GELUActivation)
        and "forward" not in layer.__dict__  # where accelerate puts its own
        and not _has_hooks(layer)
        and not _has_any_global_hook()
    )


def _has_hooks(module: nn.Module) -> bool:
    own = module.__dict__  # nn.Module looks attributes up more slowly
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def _is_batched(grad: Tensor) -> bool:
    """Whether vmap holds many gradients at once: that of ``torch.func``, or the older one of ``torch.autograd``."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad)


def _without_autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def _wide(x: Tensor) -> torch.dtype:
    """The type to attend in: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _parts(qkv: Tensor, mask: Tensor | None) -> list[slice]:
    """Whole images, or windows where there is no mask, whose queries, keys and values stay in the cache."""
    together = 1 if mask is None else mask.shape[0]
    step = max(1, ATTENDED_BYTES // (qkv.shape[1:].numel() * _wide(qkv).itemsize * together)) * together
    return [slice(start, start + step) for start in range(0, qkv.shape[0], step)]


def _by_head(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as matrices: ``(B * nW, N, 3, h, d)`` to three copies ``(B * nW * h, N, d)``."""
    parts = qkv.permute(2, 0, 3, 1, 4)
    query, key, value = qkv.new_empty(parts.shape, dtype=_wide(qkv)).copy_(parts).flatten(1, 2).unbind(0)
    return query, key, value


def _by_token(x: Tensor, heads: int) -> Tensor:
    """The way back, a view: ``(B * nW * h, N, d)`` to ``(B * nW, N, h, d)``."""
    return x.view(-1, heads, *x.shape[1:]).transpose(1, 2)


def _define(qkv: Tensor, bias: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B * nW, h, N, d each
    if mask is not None:
        bias = (bias + mask).repeat(qkv.shape[0] // mask.shape[0], 1, 1, 1)
    out: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(qkv.dtype), scale=scaling)
    return out.transpose(1, 2)
