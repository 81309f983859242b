"""Window attention, W-MSA and SW-MSA of section 3.2: the plain definition, and the choice of who computes it.

``eager`` is the definition; every other backend agrees with it in outputs and gradients. A backend that is asked
for by name runs or raises with its reasons; ``auto`` takes the first that has none.

Shape legend:
    B batch, Hp and Wp height and width of a padded map in tokens, C channels,
    nW windows of a map, N tokens of a window, h heads, d channels of a head (C = h * d).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_triton import reasons_against_triton, triton_window_attention
from .configuration_swin_hf import SwinHFConfig
from .windows import (
    Pair,
    WindowGeometry,
    bias_index,
    cyclic_shift,
    window_mask,
    window_partition,
    window_reverse,
)

BACKENDS = ("eager", "sdpa", "triton", "auto")


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


def choose_backend(config: SwinHFConfig, x: Tensor, head_dim: int, dropout: float) -> str:
    """Name of the backend that attends to ``x``: the one that was asked for, or the first without objections.

    Raises:
        NotImplementedError: If a backend was asked for by name and cannot run; the message gives every reason.
    """
    wanted = config._attn_implementation or "sdpa"
    if wanted not in ("triton", "auto"):
        return wanted
    reasons = reasons_against_triton(x.device, x.dtype, head_dim, dropout)
    if not reasons:
        return "triton"
    if wanted == "auto":
        return "sdpa"
    raise NotImplementedError(
        f"attn_implementation='triton' cannot run here: {'; '.join(reasons)}; use 'sdpa', or 'auto' to let it choose"
    )


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
        self.scaling = (dim // num_heads) ** -0.5
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
            else choose_backend(self.config, x, x.shape[-1] // self.num_heads, dropout)
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

        windows = window_partition(cyclic_shift(x, geometry.shift), geometry.window)  # B * nW, N, C
        qkv = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1))  # B * nW, N, 3, h, d
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B * nW, h, N, d each
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            backend, eager_attention
        )
        windows, probabilities = attend(
            self,
            query,
            key,
            value,
            self.additive_mask(query, geometry),
            scaling=self.scaling,
            dropout=dropout,
        )  # B * nW, N, h, d
        windows = self.proj(windows.flatten(-2))  # B * nW, N, C
        x = window_reverse(windows, geometry.window, geometry.padded)  # B, Hp, Wp, C
        return cyclic_shift(
            x, (-geometry.shift[0], -geometry.shift[1])
        ), probabilities if output_attentions else None

    def relative_position_bias(self, window: Pair) -> Tensor:
        """The bias of every pair of tokens of a window, ``(1, h, N, N)``."""
        table = self.relative_position_bias_table
        index = bias_index(table, window, self.window)
        return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).unsqueeze(0)

    def additive_mask(self, query: Tensor, geometry: WindowGeometry) -> Tensor:
        """Bias and mask together: ``(1, h, N, N)``, or ``(B * nW, h, N, N)`` where windows differ."""
        bias = self.relative_position_bias(geometry.window).to(query.dtype)
        mask = window_mask(query, geometry, self.config.mask_padding)  # nW, 1, N, N
        if mask is None:
            return bias
        return (bias + mask).repeat(query.shape[0] // mask.shape[0], 1, 1, 1)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window[0]}x{self.window[1]}"
