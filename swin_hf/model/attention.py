"""Window attention: the plain definition, and the choice of who computes it.

``eager`` is the definition; every other backend agrees with it in outputs and gradients. A backend that is asked
for by name runs or raises with its reasons; ``auto`` takes the first without any. ``kernels_cpu.py`` and
``kernels_triton.py`` are optional: without them, or on a torch that lacks a name that they import, everything here
computes the same in more time.

Shape legend:
    B batch, Hp and Wp height and width of a padded map in tokens, C channels,
    nW windows of a map, N tokens of a window, h heads, d channels of a head (C = h * d).
"""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .configuration_swin_hf import SwinHFConfig
from .windows import (
    Pair,
    WindowGeometry,
    cyclic_shift,
    relative_position_index,
    window_mask,
    window_partition,
    window_reverse,
)

try:
    from .kernels_triton import reasons_against_triton, triton_window_attention
except ImportError as error:
    NO_TRITON = f"the kernels cannot be imported ({error})"

    def reasons_against_triton(
        device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, window: Pair | None = None
    ) -> list[str]:
        """Say that there are no kernels."""
        return [NO_TRITON]


try:
    from .kernels_cpu import attend_here, is_plain, is_transformed, may_attend_here, only_evaluates
    from .kernels_cpu import in_parts as in_parts
    from .kernels_cpu import linear as linear
except ImportError:

    def is_plain(*tensors: Tensor) -> bool:
        """Whether tensors are known to be plain, so that results may be cached and shortcuts taken: never."""
        return False

    only_evaluates = is_plain

    def may_attend_here(query: Tensor, *sources: Tensor) -> bool:
        """Whether there is a faster backward: no."""
        return False

    def is_transformed() -> bool:
        """Whether a transform of ``torch.func`` may be active: it is unknown."""
        return True

    def linear(layer: nn.Module, x: Tensor, activation: nn.Module | None = None, bias: Tensor | None = None) -> Tensor:
        """Apply a linear layer, a bias if it has none, and its activation, ``(..., C_in)`` to ``(..., C_out)``."""
        y: Tensor = layer(x)
        y = y if bias is None else y + bias.to(y.dtype)
        return y if activation is None else activation(y)

    def in_parts(
        stage: nn.Module, x: Tensor, mlp_ratio: float, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Run a stage on ``(B, H, W, C)``."""
        return stage(x, output_attentions)


BACKENDS = ("eager", "sdpa", "triton", "auto")  # slowest first
UNASKED = "the faster kernel could run here; set attn_implementation='auto'"
# Windows that torch's fused attention takes in one call on a GPU: a limit of the launch (pytorch#142228).
SDPA_WINDOWS = 65_535
# Bytes of all sums of bias and mask that are kept; Swin-B at 384 pixels with windows of 12 needs 80 MiB.
BIAS_BYTES = 128 * 2**20

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
    """``SoftMax(Q K^T / sqrt(d) + B) V``, equation 4 of the paper.

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
        wants_speed = wanted == "sdpa" and device.type == "cuda" and not config.cosine_attention
        if wants_speed and not torch.compiler.is_compiling():
            _point_at_triton(device, dtype, head_dim, dropout, window)
        return wanted
    reasons = _reasons(config, device, dtype, head_dim, dropout, window)
    if not reasons:
        return "triton"
    if wanted == "auto":
        if not torch.compiler.is_compiling():
            # A user loses time only on a GPU that could run the kernel.
            say = logger.warning_once if device.type == "cuda" else logger.info_once
            say(str(BackendReport(wanted, "sdpa", {"triton": reasons})))
        return "sdpa"
    raise NotImplementedError(
        f"attn_implementation='triton' cannot run here: {'; '.join(reasons)}; use 'sdpa', or 'auto' to let it choose"
    )


def _reasons(config: SwinHFConfig, *circumstances: Any) -> list[str]:
    """Reasons against the kernel in a model of this configuration."""
    if config.cosine_attention:
        return ["the kernel has no cosine attention, which Swin Transformer V2 has"]
    return reasons_against_triton(*circumstances)


@lru_cache(maxsize=64)
def _point_at_triton(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, window: Pair) -> None:
    """Say once that the default leaves the kernel unused on a GPU that could run it."""
    if not reasons_against_triton(device, dtype, head_dim, dropout, window):
        logger.warning_once(str(BackendReport("sdpa", "sdpa", {"triton": [UNASKED]})))


def backend_report(model: nn.Module) -> BackendReport:
    """Say which backend attends in a model as it is now: its device, dtype, mode and sizes.

    Args:
        model: A model of this family.

    Raises:
        TypeError: If the model is of another family.
        NotImplementedError: If a backend was asked for by name and cannot run; the message gives every reason.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "relative_position_bias")]
    if not layers:
        raise TypeError(f"{type(model).__name__} has no window attention; give a model of swin_hf")
    backends, objections = [], []
    for layer in layers:
        weight = layer.qkv.weight
        dropout = layer.dropout if layer.training else 0.0
        circumstances = weight.device, weight.dtype, layer.head_dim, dropout, layer.window
        backends.append(choose_backend(layer.config, *circumstances))
        objections += _reasons(layer.config, *circumstances)
    requested = layers[0].config._attn_implementation or "sdpa"
    backend = min(backends, key=lambda name: BACKENDS.index(name) if name in BACKENDS else -1)
    reasons = {}
    if backend != "triton":
        reasons["triton"] = list(dict.fromkeys(objections)) or [UNASKED]
    if backend == "eager":
        reasons["sdpa"] = [f"{requested!r} was asked for"]
    return BackendReport(requested, backend, reasons)


class BackendMixin:
    """What ``SwinHFPreTrainedModel`` adds to transformers' choice of an attention function."""

    config_class: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Take a configuration of this version of Swin Transformer; ValueError for one of the other version."""
        if getattr(config, "cosine_attention", None) is not self.config_class.cosine_attention:
            raise ValueError(
                f"{type(self).__name__} is a Swin Transformer V{1 + self.config_class.cosine_attention} and was given "
                f"a {type(config).__name__}; give a {self.config_class.__name__}, or use the class of that version"
            )
        parent: Any = super()
        parent.__init__(config, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for its registry of functions in the modeling file, but it is used here

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation in BACKENDS:
            return attn_implementation
        if attn_implementation is not None and "/" in attn_implementation:
            # transformers would download and run a kernel of that name; a config.json must not be able to ask for it.
            raise ValueError(f"attn_implementation {attn_implementation!r} is refused; choose one of {BACKENDS}")
        parent: Any = super()
        return parent._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


def kept(compute: Callable[..., Any], *sizes: Any, like: Tensor) -> Any:
    """What a function of :mod:`~.windows` returns for some sizes: computed once for each of them and each device.

    Args:
        compute: The function.
        sizes: Its arguments.
        like: A tensor of this call. If a tool records or transforms it, the cache is neither read nor written.
    """
    return _compute_once(compute, *sizes) if is_plain(like) else compute(*sizes)


@lru_cache(maxsize=128)
def _compute_once(compute: Callable[..., Any], *sizes: Any) -> Any:
    with torch.inference_mode(False):  # an inference tensor could not serve a later training step
        return compute(*sizes)


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


def clear_caches() -> None:
    """Free what was kept for sizes and biases of earlier calls, and repeat messages that are given once."""
    _compute_once.cache_clear()
    _point_at_triton.cache_clear()
    biases.clear()


def cut(x: Tensor, geometry: WindowGeometry) -> Tensor:
    """Shift a padded map ``(B, Hp, Wp, C)`` and cut it into windows ``(B * nW, N, C)``."""
    return window_partition(cyclic_shift(x, geometry.shift), geometry.window)


def put_back(windows: Tensor, geometry: WindowGeometry) -> Tensor:
    """Undo :func:`cut`: windows ``(B * nW, N, C)`` or ``(B * nW, N, h, d)`` become a map ``(B, Hp, Wp, C)``."""
    x = window_reverse(windows, geometry.window, geometry.padded)
    return cyclic_shift(x, (-geometry.shift[0], -geometry.shift[1]))


def attend(
    layer: Any, qkv: Sequence[Tensor], geometry: WindowGeometry, backend: str, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Attend within windows.

    Args:
        layer: The attention layer, which has the bias.
        qkv: Queries, keys and values, ``(B * nW, N, h, d)`` each.
        geometry: How the map was cut.
        backend: ``eager``, ``sdpa``, or a function that was registered with transformers.
        dropout: Probability of dropping an attention probability.

    Returns:
        ``(B * nW, N, h, d)`` and, where the backend has them, probabilities ``(B * nW, h, N, N)``.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in qkv)  # B * nW, h, N, d each
    dtype = query.dtype
    learns = torch.is_grad_enabled() and backend == "sdpa" and dropout == 0
    if learns and may_attend_here(query, *layer.bias_sources()[1]):
        bias = layer.relative_position_bias(geometry.window)[0]  # h, N, N
        return attend_here(query, key, value, bias, _mask(layer, query, geometry), layer.scaling), None
    if backend == "eager" and layer.config.cosine_attention:  # scores reach 100: bfloat16 has no fractions there
        query, key, value = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (query, key, value))
    # User-registered attention functions may change the mask in place: they do not get one that is kept.
    bias = additive_mask(layer, query, geometry, may_keep=backend in BACKENDS)
    if backend == "sdpa" and _fails_in_sdpa(query, key, value, bias):
        backend = "eager"
    function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        backend, eager_attention
    )
    if backend == "sdpa" and query.is_cuda and query.shape[0] > SDPA_WINDOWS:
        return attend_in_parts(function, layer, query, key, value, bias, SDPA_WINDOWS, dropout), None
    out, probabilities = function(layer, query, key, value, bias, scaling=layer.scaling, dropout=dropout)
    if torch.compiler.is_exporting():
        # The ONNX exporter decomposes SDPA; its output is not contiguous, and flatten() needs it to be.
        out = out.clone(memory_format=torch.contiguous_format)
    return out.to(dtype), probabilities


def attend_fused(layer: Any, qkv: Tensor, geometry: WindowGeometry) -> Tensor:
    """Cut, attend and put back in one kernel, where :func:`choose_backend` says ``triton``.

    Args:
        layer: The attention layer, which has the bias table.
        qkv: Queries, keys and values of a padded map, ``(B, Hp, Wp, 3 C)``.
        geometry: How the map is cut.

    Returns:
        The map ``(B, Hp, Wp, C)``.
    """
    table, padding = layer.relative_position_bias_table, layer.config.mask_padding
    return triton_window_attention(qkv, table, layer.window, geometry, layer.num_heads, layer.scaling, padding)


def additive_mask(layer: Any, query: Tensor, geometry: WindowGeometry, may_keep: bool = True) -> Tensor:
    """Bias and mask together: ``(1, h, N, N)``, or ``(B * nW, h, N, N)`` where windows differ."""
    sizes, sources = layer.bias_sources()

    def compute() -> Tensor:
        bias: Tensor = layer.relative_position_bias(geometry.window).to(query.dtype)
        mask = _mask(layer, query, geometry)
        return (bias if mask is None else bias + mask).contiguous()

    if may_keep and sources and only_evaluates(*sources):
        key = (sources[0].data_ptr(), sizes, geometry, layer.config.mask_padding, query.dtype)
        bias = biases.look_up(key, sources, compute)
    else:
        bias = compute()
    windows = query.shape[0]  # len(query) would fix the batch of an export, and so would the comparison
    if len(bias) == 1 or (not torch.compiler.is_exporting() and len(bias) == windows):
        return bias
    return bias.repeat(windows // len(bias), 1, 1, 1)


def look_up(table: Tensor, window: Pair, table_window: Pair) -> Tensor:
    """The row of a bias table for every pair of tokens of a window, ``(1, h, N, N)``.

    Args:
        table: ``((2 Mh - 1)(2 Mw - 1), h)`` of ``table_window``.
        window: Window that attends.
        table_window: Window that the table was made for.
    """
    index: Tensor = kept(relative_position_index, window, table_window, table.device, like=table)  # N, N
    return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).unsqueeze(0)


def _mask(layer: Any, like: Tensor, geometry: WindowGeometry) -> Tensor | None:
    """:func:`~.windows.window_mask` in the dtype and on the device of ``like``."""
    return kept(window_mask, geometry, layer.config.mask_padding, like.dtype, like.device, like=like)


def _fails_in_sdpa(query: Tensor, *others: Tensor) -> bool:
    """Whether ``scaled_dot_product_attention`` cannot do what the definition can.

    It refuses empty batches, has no forward-mode derivative, and under ``torch.func`` does not see that the bias
    learns, so that it takes a kernel that cannot be differentiated.
    """
    if torch.compiler.is_compiling():
        return False
    has_tangent = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in (query, *others))
    return query.numel() == 0 or has_tangent or (torch.is_grad_enabled() and is_transformed())


def attend_in_parts(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    size: int,
    dropout: float = 0.0,
) -> Tensor:
    """Attend for ``size`` windows at a time; arguments and result as of :func:`eager_attention`."""
    queries = query.split(size)
    added = [bias] * len(queries) if len(bias) == 1 else bias.split(size)
    parts = zip(queries, key.split(size), value.split(size), added, strict=True)
    return torch.cat([attend(module, *part, scaling=module.scaling, dropout=dropout)[0] for part in parts])
