"""The same arithmetic in less time on a CPU: nothing here changes a result by more than rounding.

Three things that a profile shows, each with its answer (docs/speed.md has the result):

- ``nn.Linear`` leaves float32 products to the BLAS library of the build. oneDNN, which comes with torch as well, is
  8 to 30 % faster at Swin's shapes and applies GELU on the way: :func:`linear`.
- The allocator maps every tensor over 32 MiB afresh, and first touching it costs four times the copy. A few images at
  a time stay in the cache and in recycled memory: :func:`images_at_once`.
- ``scaled_dot_product_attention`` has no kernel for a bias that learns, and falls back to a dozen passes over the
  scores: :class:`WindowAttention` has a backward of its own.

Whatever is not a plain float32 tensor in a plain layer takes the ordinary way: compilers and exporters, autocast,
``torch.func``, adapters, quantised or sharded weights, layers with hooks. ``torch.backends.mkldnn.flags(False)`` turns
oneDNN off here as everywhere in torch.

Shape legend:
    B batch, H and W height and width of a map in tokens, C channels,
    nW windows of a map, N tokens of a window, h heads, d channels of a head (C = h * d).
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation

# Hidden layer of an MLP that is worth having at once, in bytes: of 4, 8, 16 MiB and no limit, the fastest.
CACHED_BYTES = 16 * 2**20

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
    weight, bias = layer.weight, layer.bias
    gelu = type(activation) is GELUActivation and _is_bare(activation)
    y: Tensor
    if _ONEDNN is None or not _is_bare(layer):
        y = layer(x)
    elif torch.compiler.is_compiling():
        if _may_be_opaque(x, weight):
            y = _compiled_linear(x, weight, bias, gelu)
            return y if gelu or activation is None else activation(y)
        y = layer(x)
    elif not (_is_plain(x, weight) and torch.backends.mkldnn.enabled):
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


def in_plain_evaluation(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor on a CPU and what is computed from it has no gradient."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and _is_plain(x, dtypes=FLOATS)


def attends_itself(qkv: Tensor, bias: Tensor) -> bool:
    """Whether :class:`WindowAttention` should do what ``scaled_dot_product_attention`` does slowly here."""
    return (
        torch.is_grad_enabled()
        and bias.requires_grad
        and not torch.compiler.is_compiling()
        and _is_plain(qkv, bias, dtypes=(torch.float32, torch.float64))
    )


class WindowAttention(Function):
    """``SoftMax(Q K^T scaling + bias + mask) V`` with a backward of five passes over the scores instead of a dozen."""

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
        query, key, value = _by_head(qkv)  # B * nW * h, N, d each
        scores = torch.bmm(query.mul_(scaling), key.transpose(1, 2))  # B * nW * h, N, N
        if mask is None:
            scores.view(-1, *bias.shape).add_(bias)
        else:
            scores.view(-1, mask.shape[0], *bias.shape).add_(bias + mask)
        probabilities = torch.softmax(scores, -1, out=scores)
        ctx.save_for_backward(qkv, bias, mask, probabilities)
        ctx.scaling = scaling
        out: Tensor = _by_token(torch.bmm(probabilities, value), qkv.shape[3])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate with respect to ``qkv`` and ``bias``."""
        qkv, bias, mask, probabilities = ctx.saved_tensors
        scaling = ctx.scaling
        if torch.is_grad_enabled():  # a second derivative is wanted: differentiate the definition
            out = _define(qkv, bias, mask, scaling)
            return (*torch.autograd.grad(out, (qkv, bias), grad, create_graph=True), None, None)
        heads = qkv.shape[3]
        query, key, value = _by_head(qkv)  # B * nW * h, N, d each
        grad = grad.transpose(1, 2).reshape(value.shape)
        grad_scores = torch.bmm(grad, value.transpose(1, 2))  # B * nW * h, N, N
        grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, probabilities, -1, grad.dtype)
        grad_query = torch.bmm(grad_scores, key).mul_(scaling)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), query).mul_(scaling)
        grad_value = torch.bmm(probabilities.transpose(1, 2), grad)
        grad_qkv = torch.stack([_by_token(part, heads) for part in (grad_query, grad_key, grad_value)], dim=2)
        return grad_qkv, grad_scores.view(-1, *bias.shape).sum(0), None, None


class _Linear(Function):
    """A linear layer whose products with the weight are computed by oneDNN, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        if torch.is_grad_enabled():  # a second derivative is wanted: oneDNN's operator has none
            grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        else:
            grad_x = _onednn_linear(rows, weight.t(), None).view(x.shape) if ctx.needs_input_grad[0] else None
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
        and not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _is_plain(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether these are ordinary dense tensors on a CPU, and nobody is watching what is done with them."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu or tensor.dtype not in dtypes:
            return False
    return not (
        torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or torch._C._len_torch_dispatch_stack()  # fake tensors, proxies of an exporter, counters of operations
        or torch._C._are_functorch_transforms_active()
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


def _by_head(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as matrices: ``(B * nW, N, 3, h, d)`` to three copies ``(B * nW * h, N, d)``."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2).unbind(0)
    return query, key, value


def _by_token(x: Tensor, heads: int) -> Tensor:
    """The way back, a view: ``(B * nW * h, N, d)`` to ``(B * nW, N, h, d)``."""
    return x.view(-1, heads, *x.shape[1:]).transpose(1, 2)


def _define(qkv: Tensor, bias: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B * nW, h, N, d each
    if mask is not None:
        bias = (bias + mask).repeat(qkv.shape[0] // mask.shape[0], 1, 1, 1)
    out: Tensor = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    return out.transpose(1, 2)
