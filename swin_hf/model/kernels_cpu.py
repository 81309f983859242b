"""Optional: the same arithmetic in less time on a CPU. Nothing here changes a result by more than rounding.

What each part gains on which processor is a table in docs/speed.md:

- :func:`linear`: without gradients, oneDNN, which comes with torch, multiplies faster than the BLAS library of the
  build, and applies GELU to what it has just computed.
- :func:`in_parts`: the allocator asks the system for every tensor over 32 MiB, and the first write to new memory takes
  four times as long as the copy. The tensors of a few images fit the cache and memory that was used before.
- :func:`attend_here`: ``scaled_dot_product_attention`` has no kernel for a bias that learns. This has a backward of its
  own, and no numbers so small that a processor slows down.

Compilers and exporters, ``torch.func``, adapters, quantised or sharded weights, and layers with hooks get torch's own
operators; :func:`is_plain` decides. ``torch.backends.mkldnn.flags(False)`` turns oneDNN off here, too.

Only this file and ``kernels_triton.py`` use private names of torch. All of them are imported below: on a torch that
has lost one, the import fails and ``attention.py`` computes without the file.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, _softmax_backward_data, nn
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function, forward_ad
from torch.autograd.forward_ad import _current_level  # noqa: F401 - read below as it changes
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation

# Bytes of the hidden layer of an MLP to compute at once: 16 MiB was the fastest of 4, 8, 16 MiB and no limit.
CACHED_BYTES = 16 * 2**20


def _find_onednn() -> tuple[Any, tuple[torch.dtype, ...]]:
    """The operator of oneDNN for a linear layer and its activation, and the types that it multiplies fast."""
    # On processors other than x86, oneDNN is built on other libraries, which were not measured.
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return None, ()
    try:
        multiply, has_bfloat16 = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._is_mkldnn_bf16_supported
    except AttributeError:  # a build of torch without it
        return None, ()
    return multiply, (torch.float32, torch.bfloat16) if has_bfloat16() else (torch.float32,)


_ONEDNN, _ONEDNN_TYPES = _find_onednn()


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
    """Whether these are plain tensors on a CPU, outside of autocast, and what is computed has no gradient."""
    without = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return without and all(tensor.is_cpu for tensor in tensors) and is_plain(*tensors)


def may_attend_here(query: Tensor, *sources: Tensor) -> bool:
    """Whether ``scaled_dot_product_attention`` is slow here: the bias, computed from ``sources``, learns."""
    learns = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    return learns and all(tensor.is_cpu for tensor in (query, *sources)) and is_plain(query, *sources)


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
    """Apply a linear layer and its activation, ``(..., C_in)`` to ``(..., C_out)``.

    ``bias`` is that of a layer which has none of its own.
    """
    if not isinstance(layer, nn.Linear) or not _is_bare(layer):  # a wrapper may have no weight
        y: Tensor = layer(x)
        y = y if bias is None else y + bias.to(y.dtype)
        return y if activation is None else activation(y)
    tensors = _as_autocast(x, layer.weight, layer.bias if bias is None else bias)
    if not _may_use_onednn(*tensors):
        y = F.linear(*tensors)
    elif type(activation) is GELUActivation and _is_bare(activation):
        y, activation = _ONEDNN(*tensors, "gelu", [], "none"), None  # the exact one, with erf
    else:
        y = _ONEDNN(*tensors, "none", [], "")
    return y if activation is None else activation(y)


def _as_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the type that autocast gives to a linear layer, where it is on."""
    if not torch.is_autocast_enabled("cpu") or torch.is_grad_enabled() or not is_plain(tensors[0]):
        return tensors  # with gradients, the layer itself converts
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(t.to(dtype) if t is not None and t.is_cpu and t.dtype == torch.float32 else t for t in tensors)


def _may_use_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are plain tensors on a CPU without a gradient, of one type that oneDNN multiplies fast."""
    if x.dtype not in _ONEDNN_TYPES or torch.is_grad_enabled() or not torch.backends.mkldnn.enabled:
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return all(tensor.is_cpu and tensor.dtype == x.dtype for tensor in tensors) and is_plain(*tensors)


# A few images at a time


def in_parts(
    stage: nn.Module, x: Tensor, mlp_ratio: float, output_attentions: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Run a stage on ``(B, H, W, C)``, in equal parts of a few images where that is faster.

    Images do not depend on each other. Only hooks could tell the difference: with one anywhere in the stage, the batch
    stays whole. With gradients, every tensor is kept and new memory is needed all the same.
    """
    parts = 1
    if not output_attentions and not torch.is_grad_enabled() and x.is_cpu and is_plain(x):  # asks no exporter for sizes
        batch, height, columns, channels = x.shape
        fitting = max(1, CACHED_BYTES // (height * columns * int(channels * mlp_ratio) * x.element_size()))
        parts = -(-batch // fitting)
    if parts <= 1 or _has_any_global_hook() or any(map(_has_hooks, stage.modules())):
        return stage(x, output_attentions)
    return torch.cat([stage(part)[0] for part in x.chunk(parts)]), None


# Attention with a bias that learns


def attend_here(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """``SoftMax(Q K^T scaling + bias + mask) V``, with a backward of its own.

    What has 16 bits is multiplied in 16 bits; softmax and products sum in float32.

    Args:
        query: ``(B * nW, h, N, d)``.
        key: ``(B * nW, h, N, d)``.
        value: ``(B * nW, h, N, d)``.
        bias: ``(h, N, N)``.
        mask: ``(nW, 1, N, N)`` or None; has no gradient.
        scaling: ``1 / sqrt(d)``.

    Returns:
        ``(B * nW, N, h, d)``.
    """
    by_head = torch.stack((query, key, value)).flatten(1, 2)  # 3, B * nW * h, N, d
    return WindowAttention.apply(by_head, bias, mask, scaling).unflatten(0, query.shape[:2]).transpose(1, 2)


class WindowAttention(Function):
    """:func:`attend_here` for autograd, with queries, keys and values as matrices ``(3, B * nW * h, N, d)``."""

    @staticmethod
    def forward(ctx: Any, by_head: Tensor, bias: Tensor, mask: Tensor | None, scaling: float) -> Any:
        """Attend within windows; see :func:`attend_here`."""
        query, key, value = by_head.unbind()
        added = bias if mask is None else bias + mask  # h, N, N, or nW, h, N, N
        with torch.autocast("cpu", enabled=False):
            shares = torch.bmm(query * scaling, key.transpose(1, 2))  # B * nW * h, N, N: the scores
            shares.view(-1, *added.shape).add_(added)
            torch.softmax(shares, -1, out=shares)  # which sums in float32
            if mask is not None:  # exp(-100) is so small that many processors multiply it at a fraction of their speed
                F.threshold(shares, torch.finfo(shares.dtype).tiny, 0.0, inplace=True)
            ctx.save_for_backward(by_head, bias, mask, shares)
            ctx.scaling = scaling
            return torch.bmm(shares, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate with respect to ``by_head`` and ``bias``."""
        by_head, bias, mask, shares = ctx.saved_tensors
        again = torch.is_grad_enabled()  # a second derivative is wanted: differentiate the definition
        if again or _are_functorch_transforms_active() or is_legacy_batchedtensor(grad):
            wanted = [tensor for tensor, needed in zip((by_head, bias), ctx.needs_input_grad, strict=False) if needed]
            with torch.enable_grad():
                out = _define(by_head, bias, mask, ctx.scaling)
            grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
            return (*(next(grads) if needed else None for needed in ctx.needs_input_grad[:2]), None, None)
        query, key, value = by_head.unbind()
        grad_by_head = torch.empty_like(by_head)
        with torch.autocast("cpu", enabled=False):
            grad_scores = torch.bmm(grad, value.transpose(1, 2))  # B * nW * h, N, N
            grad_scores = _softmax_backward_data(grad_scores, shares, -1, grad.dtype)
            grad_bias = grad_scores.view(-1, *bias.shape).sum(0, dtype=bias.dtype)
            torch.bmm(shares.transpose(1, 2), grad, out=grad_by_head[2])
            torch.bmm(grad_scores.mul_(ctx.scaling), key, out=grad_by_head[0])
            torch.bmm(grad_scores.transpose(1, 2), query, out=grad_by_head[1])
        return grad_by_head, grad_bias, None, None


def _define(by_head: Tensor, bias: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """:class:`WindowAttention` with operators that torch can differentiate any number of times."""
    query, key, value = by_head.unbind()
    added = bias if mask is None else bias + mask
    scores = (query * scaling) @ key.transpose(1, 2)
    probabilities = (scores.view(-1, *added.shape) + added).softmax(-1).to(value.dtype)
    return torch.bmm(probabilities.view(scores.shape), value)
