"""Window attention, W-MSA and SW-MSA of section 3.2: the plain definition, and the choice of who computes it.

``eager`` is the definition; every other backend agrees with it in outputs and gradients. A backend that is asked
for by name runs or raises with its reasons; ``auto`` takes the first that has none.

Shape legend:
    B batch, Hp and Wp height and width of a padded map in tokens, C channels,
    nW windows of a map, N tokens of a window, h heads, d channels of a head (C = h * d).
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .attention_triton import reasons_against_triton, triton_window_attention
from .configuration_swin_hf import SwinHFConfig
from .fast_cpu import WindowAttention, attends_itself, in_plain_evaluation, linear
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
        reasons["triton"] = list(dict.fromkeys(objections)) or [f"{requested!r} was asked for; 'auto' would take it"]
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

        gathers = geometry.is_shifted and in_plain_evaluation(x)  # else the gradient would be a scatter, which is slow
        if gathers:
            order, back = window_order(geometry, x.device)
            windows = x.flatten(1, 2).index_select(1, order).view(-1, geometry.area, x.shape[-1])  # B * nW, N, C
        else:
            windows = window_partition(cyclic_shift(x, geometry.shift), geometry.window)  # B * nW, N, C
        qkv = linear(self.qkv, windows).unflatten(-1, (3, self.num_heads, -1))  # B * nW, N, 3, h, d
        windows, probabilities = self._attend(qkv, geometry, backend, dropout)  # B * nW, N, h, d
        windows = linear(self.proj, windows.flatten(-2))  # B * nW, N, C
        if gathers:
            x = windows.view(x.shape[0], -1, x.shape[-1]).index_select(1, back).view(x.shape)  # B, Hp, Wp, C
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
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            backend, eager_attention
        )
        bias = self.additive_mask(query, geometry)
        return attend(self, query, key, value, bias, scaling=self.scaling, dropout=dropout)

    def relative_position_bias(self, window: Pair) -> Tensor:
        """The bias of every pair of tokens of a window, ``(1, h, N, N)``."""
        table = self.relative_position_bias_table
        index = bias_index(table, window, self.window)
        return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).unsqueeze(0)

    def additive_mask(self, query: Tensor, geometry: WindowGeometry) -> Tensor:
        """Bias and mask together: ``(1, h, N, N)``, or ``(B * nW, h, N, N)`` where windows differ."""
        table = self.relative_position_bias_table
        if in_plain_evaluation(table):
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
