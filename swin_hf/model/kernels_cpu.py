"""Optional: the same arithmetic in less time on a CPU. Nothing here changes a result by more than rounding.

A profile shows three costs (docs/speed.md has the results):

- ``nn.Linear`` leaves float32 products to the BLAS library of the build. oneDNN, which comes with torch as well, is
  8 to 30 % faster at Swin's shapes, and applies GELU to what it has just computed: :func:`linear`.
- The allocator asks the system for every tensor over 32 MiB, and the first write to new memory takes four times as long
  as the copy. The tensors of a few images fit the cache and memory that was used before: :func:`in_parts`.
- ``scaled_dot_product_attention`` has no kernel for a bias that learns, and makes a dozen passes over the scores:
  :func:`attend_here` has a backward of its own.

Compilers and exporters, ``torch.func``, adapters, quantised or sharded weights, and layers with hooks get torch's own
operators; :func:`is_plain` decides. ``torch.backends.mkldnn.flags(False)`` turns oneDNN off here, too.

Only this file and ``kernels_triton.py`` use private names of torch. All of them are imported below: on a torch that
has lost one, the import fails and ``attention.py`` computes without the file.
"""

import platform
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function, forward_ad
from torch.autograd.forward_ad import _current_level  # noqa: F401 - read below as it changes
from torch.compiler import _is_exporting_flag  # noqa: F401 - likewise
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation

try:
    softmax_backward = torch.ops.aten._softmax_backward_data
except AttributeError as error:
    raise ImportError(f"torch has no {error}") from error

# Bytes of the hidden layer of an MLP to compute at once: 16 MiB was the fastest of 4, 8, 16 MiB and no limit.
CACHED_BYTES = 16 * 2**20
# Bytes of queries, keys and values to attend with at once: 2 MiB was the fastest of 1, 2, 4, 8 MiB and no limit.
ATTENDED_BYTES = 2 * 2**20
# Bytes of all sums of bias and mask that are kept; Swin-B at 384 pixels with windows of 12 needs 80 MiB.
BIAS_BYTES = 128 * 2**20

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# A namespace for each copy of this file: code that came with a model must not replace an installed package's operator.
_NAMESPACE = __name__.replace(".", "_")


def _find_onednn() -> Any:
    """The operator of oneDNN for a linear layer and its activation; None without it."""
    # On processors other than x86, oneDNN is built on other libraries, which were not measured.
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:  # a build of torch without it
        return None


_ONEDNN = _find_onednn()


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary dense tensors, and no tool records, transforms or replays what is done with them."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return False
    return not (
        torch.compiler.is_compiling()
        or _get_tracing_state() is not None  # torch.jit.trace
        or _len_torch_dispatch_stack()  # fake tensors, proxies of an exporter, counters of operations
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # dual numbers: our operators would drop the tangents
        or (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())  # CUDA graphs reuse what they allocate
    )


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` is active."""
    return _are_functorch_transforms_active()


def only_evaluates(*tensors: Tensor) -> bool:
    """Whether these are plain tensors on a CPU and what is computed from them has no gradient."""
    return not torch.is_grad_enabled() and _is_on_cpu(*tensors, dtypes=FLOATS) and is_plain(*tensors)


def may_attend_here(qkv: Tensor, *sources: Tensor) -> bool:
    """Whether :func:`attend_here` should do what ``scaled_dot_product_attention`` does slowly here.

    Args:
        qkv: Queries, keys and values.
        sources: What the bias is computed from; only one that learns is slow.
    """
    learns = any(source.requires_grad for source in sources)
    wanted = torch.is_grad_enabled() and learns and not torch.compiler.is_compiling()
    return wanted and _is_on_cpu(qkv, *sources, dtypes=FLOATS, autocast=True) and is_plain(qkv, *sources)


def _is_on_cpu(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,), autocast: bool = False) -> bool:
    """Whether tensors are on a CPU, of one of ``dtypes`` each; not under autocast, unless ``autocast`` allows it."""
    fits = all(tensor.is_cpu and tensor.dtype in dtypes for tensor in tensors)
    return fits and (autocast or not torch.is_autocast_enabled("cpu"))


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


# Linear layers


def linear(layer: nn.Module, x: Tensor, activation: nn.Module | None = None, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer and its activation, ``(..., C_in)`` to ``(..., C_out)``, the fastest way that is exact.

    ``bias`` is that of a layer which has none of its own.
    """
    y: Tensor
    if not isinstance(layer, nn.Linear) or not _is_bare(layer):  # a wrapper may have no weight
        y = layer(x)
        y = y if bias is None else y + bias.to(y.dtype)
        return y if activation is None else activation(y)
    weight, bias = layer.weight, layer.bias if bias is None else bias
    tensors = (x, weight) if bias is None else (x, weight, bias)
    multiply: Callable[..., Tensor] | None
    if torch.compiler.is_compiling():
        multiply = _compiled_linear if _may_be_opaque(x, weight) else None
    else:
        multiply = _onednn_linear if _may_use_onednn(*tensors) else None
    if multiply is None:
        y = F.linear(x, weight, bias)
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        y = _Linear.apply(x, weight, bias)
    else:
        gelu = type(activation) is GELUActivation and _is_bare(activation)
        y, activation = multiply(x, weight, bias, gelu), None if gelu else activation
    return y if activation is None else activation(y)


def _may_use_onednn(*tensors: Tensor) -> bool:
    has_it = _ONEDNN is not None and torch.backends.mkldnn.enabled
    return bool(has_it and _is_on_cpu(*tensors) and is_plain(*tensors))


class _Linear(Function):
    """A linear layer whose products with the weight oneDNN computes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Like nn.Linear, a frozen layer keeps no activations.
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
        # Here the BLAS library is as fast, and its result has the layout of the parameter.
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Multiply ``(..., C_in)`` with ``(C_out, C_in)``; GELU is the exact one, with erf."""
    y: Tensor = _ONEDNN(x, weight, bias, *(("gelu", [], "none") if gelu else ("none", [], "")))
    return y


@torch.library.custom_op(f"{_NAMESPACE}::linear", mutates_args=())
def _compiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """What :func:`linear` computes without gradients, as one operator that a compiler does not look into."""
    return _onednn_linear(x, weight, bias, gelu)


@_compiled_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _may_be_opaque(x: Tensor, weight: Tensor) -> bool:
    """Whether a compiled graph may hold our operator: not one for export, for autograd or for another device."""
    return (
        _ONEDNN is not None
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler._is_exporting_flag  # Dynamo of torch 2.11 takes is_exporting() to be true everywhere
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )


# A few images at a time


def in_parts(
    stage: nn.Module, x: Tensor, mlp_ratio: float, output_attentions: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Run a stage on ``(B, H, W, C)``, a few images at a time where that is faster.

    Images do not depend on each other. Only hooks could tell the difference: with one anywhere in the stage, the batch
    stays whole.
    """
    images = x.shape[0] if output_attentions else images_at_once(x, int(x.shape[-1] * mlp_ratio), stage)
    if images >= x.shape[0]:
        y: tuple[Tensor, Tensor | None] = stage(x, output_attentions)
        return y
    return torch.cat([stage(part)[0] for part in x.split(images)]), None


def images_at_once(x: Tensor, width: int, module: nn.Module) -> int:
    """How many images of a batch should go through ``module`` together, at least 1 and at most all.

    Args:
        x: Map, ``(B, H, W, C)``.
        width: Channels of the widest layer.
        module: What they go through.
    """
    batch, height, columns, _ = x.shape
    if torch.compiler.is_compiling() or x.device.type != "cpu" or _get_tracing_state() is not None:
        return batch
    fitting = max(1, CACHED_BYTES // (height * columns * width * x.element_size()))
    if batch <= fitting or type(x) is not Tensor or _has_any_global_hook() or any(map(_has_hooks, module.modules())):
        return batch
    parts = -(-batch // fitting)
    return -(-batch // parts)  # equal parts


# Attention with a bias that learns


def attend_here(qkv: Tensor, bias: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """``SoftMax(Q K^T scaling + bias + mask) V``, with a backward of five passes over the scores instead of a dozen.

    Queries and keys of 16 bits are attended with in float32, as ``scaled_dot_product_attention`` does.

    Args:
        qkv: ``(B * nW, N, 3, h, d)``.
        bias: ``(h, N, N)``.
        mask: ``(nW, 1, N, N)`` or None; has no gradient.
        scaling: ``1 / sqrt(d)``.

    Returns:
        ``(B * nW, N, h, d)``.
    """
    out: Tensor = WindowAttention.apply(qkv, bias, mask, scaling)
    return out


class WindowAttention(Function):
    """:func:`attend_here` for autograd."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attend within windows; see :func:`attend_here`."""
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
        if again or _are_functorch_transforms_active() or is_legacy_batchedtensor(grad):
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
                grad_scores = softmax_backward(grad_scores, shares, -1, shares.dtype)
                grad_part = grad_qkv[part].unbind(2)  # B * nW, N, h, d each
                grad_part[0].copy_(_by_token(torch.bmm(grad_scores, key).mul_(scaling), heads))
                grad_part[1].copy_(_by_token(torch.bmm(grad_scores.transpose(1, 2), query).mul_(scaling), heads))
                grad_part[2].copy_(_by_token(torch.bmm(shares.transpose(1, 2), grad_out), heads))
                grad_bias += grad_scores.view(-1, *bias.shape).sum(0)
        return grad_qkv, grad_bias.to(bias.dtype), None, None


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
    """Undo :func:`_by_head` with a view: ``(B * nW * h, N, d)`` to ``(B * nW, N, h, d)``."""
    return x.view(-1, heads, *x.shape[1:]).transpose(1, 2)


def _define(qkv: Tensor, bias: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """:func:`attend_here` with operators that torch can differentiate any number of times."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B * nW, h, N, d each
    if mask is not None:
        bias = (bias + mask).repeat(qkv.shape[0] // mask.shape[0], 1, 1, 1)
    out: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(qkv.dtype), scale=scaling)
    return out.transpose(1, 2)


# Sums of bias and mask that evaluation need not compute again


class BiasCache:
    """What was computed from a table or a small network, for as long as its parameters have the same values.

    The values are compared on every call, so that an entry cannot become stale, whichever way a weight is changed,
    and no model holds it. The sources are small: the comparison costs microseconds.

    Args:
        capacity: Bytes of all entries together; when they are exceeded, the cache begins anew.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.size = 0
        self.entries: dict[Hashable, tuple[list[Tensor], Tensor]] = {}

    def look_up(self, key: Hashable, sources: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` returned for sources of these values, or returns now."""
        known = self.entries.get(key)
        if known is not None and all(map(torch.equal, known[0], sources)):
            return known[1]
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not serve a training step
            made_from, bias = [source.detach().clone() for source in sources], compute()
        if bias.nbytes <= self.capacity:
            self.size += bias.nbytes if known is None else 0
            if self.size > self.capacity:
                self.entries, self.size = {}, bias.nbytes
            self.entries[key] = made_from, bias
        return bias


biases = BiasCache(BIAS_BYTES)
