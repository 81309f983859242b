"""Swin Transformer V2 (https://arxiv.org/abs/2111.09883): what differs from V1, whose parts and loop it is built on.

Three things, so that a model can grow and take larger images (section 3 of the paper):

- the norms come last: each branch of a block is normalised before it is added, and merging normalises after it
  projects, so that the activations of a deep network keep their size;
- attention scores are cosines times a learned scale, so that no pair of tokens can dominate by its length;
- the bias is not a table but a small network of the logarithm of the offset, so that a larger window has a bias too.

Shape legend, on top of that of ``modeling_swin_hf.py``:
    Mh and Mw sides of the window that attends.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .attention import kept, linear, look_up
from .configuration_swin_hf import SwinHFConfig
from .configuration_swinv2_hf import SwinV2HFConfig
from .modeling_swin_hf import (
    SwinHFAttention,
    SwinHFBackbone,
    SwinHFBlock,
    SwinHFForImageClassification,
    SwinHFForMaskedImageModeling,
    SwinHFModel,
    SwinHFPatchMerging,
    SwinHFPreTrainedModel,
    SwinHFStage,
)
from .windows import Pair, gather_neighbours, log_spaced_offsets, pad_to_windows, window_geometry

LARGEST_SCALE = math.log(100)  # of a head, as its logarithm: scores stay below 100


def cosine_attention_inputs(query: Tensor, key: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scale queries and keys so that their dot product is the score of equation 2: the cosine times the head's scale.

    A vector of zeros, as the key of a padded token is, stays zero and has no gradient. The factors are computed in
    float32 at least, and the product is rounded once, so that half precision cannot divide by zero.

    Args:
        query: ``(B * nW, N, h, d)``, and ``key`` alike; both are returned in their shape and dtype.
        key: See there.
        logit_scale: Logarithm of the scale of each head, ``(h, 1, 1)``; at most :data:`LARGEST_SCALE` is used.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = logit_scale.to(wide).clamp(max=LARGEST_SCALE).exp().view(-1, 1)  # h, 1

    def normalise(vectors: Tensor, scale: Tensor | float) -> Tensor:
        x = vectors.to(wide)  # B * nW, N, h, d
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * (scale / lengths.masked_fill(lengths == 0, torch.inf))).to(vectors.dtype)

    return normalise(query, scale), normalise(key, 1.0)


class SwinV2HFAttention(SwinHFAttention):
    """W-MSA and SW-MSA with scaled cosine attention (equation 2) and a bias from a network of offsets (equation 3)."""

    def __init__(self, config: SwinV2HFConfig, dim: int, num_heads: int, window: Pair) -> None:
        super().__init__(config, dim, num_heads, window)
        del self.relative_position_bias_table
        self.scaling = 1.0  # each head has its own
        self.unit = window  # that offsets are divided by; the block sets that of its stage
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.empty(dim)) if config.qkv_bias else None
        self.v_bias = nn.Parameter(torch.empty(dim)) if config.qkv_bias else None
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))

    def project(self, windows: Tensor) -> Sequence[Tensor]:
        """Queries and keys, ready for a dot product, and values, ``(B * nW, N, h, d)`` each, of ``(B * nW, N, C)``."""
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # a key has none
        qkv = linear(self.qkv, windows, bias=bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.unbind(2)
        return *cosine_attention_inputs(query, key, self.logit_scale), value

    def relative_position_bias(self, window: Pair) -> Tensor:
        """The bias for every pair of tokens of a window, ``(1, h, N, N)``."""
        return look_up(self.bias_table(window), window, window)

    def bias_table(self, window: Pair) -> Tensor:
        """The bias for every offset in a window, between 0 and 16, ``((2 Mh - 1)(2 Mw - 1), h)``."""
        scale = self.logit_scale  # in an offloaded model, cpb_mlp has no device until it is called
        offsets = kept(log_spaced_offsets, window, self.unit, scale.device, like=scale)
        return 16 * self.cpb_mlp(offsets.to(scale.dtype)).sigmoid()

    def bias_sources(self) -> tuple[Pair, tuple[Tensor, ...]]:
        """What the bias of a window follows from; no parameters where a layer of the network was replaced."""
        layers: list[Any] = list(self.cpb_mlp)
        if [type(layer) for layer in layers] != [nn.Linear, nn.ReLU, nn.Linear]:
            return self.unit, ()
        return self.unit, (layers[0].weight, layers[0].bias, layers[2].weight)


class SwinV2HFBranchNorm(nn.LayerNorm):
    """The LayerNorm at the end of a branch: its weight starts at zero, so that a new block is the identity."""


class SwinV2HFBlock(SwinHFBlock):
    """A Swin Transformer V2 block: each branch is normalised where it ends (figure 1, "res-post-norm")."""

    attention_class = SwinV2HFAttention

    def __init__(self, config: SwinV2HFConfig, stage: int, block: int, always_partition: bool = False) -> None:
        super().__init__(config, stage, block, always_partition)
        self.attention.unit = config.bias_units[stage]
        dim, eps = config.stage_dims[stage], config.layer_norm_eps
        self.norm1, self.norm2 = SwinV2HFBranchNorm(dim, eps=eps), SwinV2HFBranchNorm(dim, eps=eps)
        period = config.extra_norm_every_n_blocks
        self.norm3 = nn.LayerNorm(dim, eps=eps) if period and (block + 1) % period == 0 else nn.Identity()

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map ``(B, H, W, C)`` to the same shape, and attention probabilities ``(B * nW, h, N, N)`` or None."""
        _, height, width, _ = x.shape
        geometry = window_geometry((height, width), self.window, self.shifted, **self.rules)
        y = pad_to_windows(x, geometry)  # B, Hp, Wp, C
        y, probabilities = self.attention(y, geometry, output_attentions)  # B, Hp, Wp, C
        x = x + self.drop_path(self.norm1(self.dropout(y[:, :height, :width])))  # B, H, W, C
        x = x + self.drop_path(self.norm2(self.mlp(x)))  # B, H, W, C
        return self.norm3(x), probabilities  # norm3 is of the main branch, in the largest models


class SwinV2HFPatchMerging(SwinHFPatchMerging):
    """Patch merging that normalises the 2C channels it has projected."""

    def __init__(self, config: SwinHFConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.norm = nn.LayerNorm(2 * dim, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, H, W, C)`` to ``(B, ceil(H / 2), ceil(W / 2), 2C)``; an odd side is padded with zeros."""
        return self.norm(linear(self.reduction, gather_neighbours(x)))


class SwinV2HFStage(SwinHFStage):
    """A sequence of V2's blocks on one map, and the merging that leads to the next stage."""

    block_class = SwinV2HFBlock  # type: ignore[assignment]  # it takes a configuration of V2 only
    merging_class = SwinV2HFPatchMerging


class SwinV2HFPreTrainedModel(SwinHFPreTrainedModel):
    """What all models of the family share: the initialisation, and what a change of windows means."""

    config: SwinV2HFConfig
    config_class = SwinV2HFConfig
    undecayed = ("cpb_mlp.", "logit_scale", "position_embeddings", "mask_token")
    _no_split_modules = ["SwinHFEmbeddings", "SwinV2HFBlock", "SwinV2HFPatchMerging"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as Microsoft does."""
        if isinstance(module, SwinV2HFAttention):
            init.constant_(module.logit_scale, math.log(10))
            for bias in (module.q_bias, module.v_bias):
                if bias is not None:
                    init.zeros_(bias)
        elif isinstance(module, SwinV2HFBranchNorm):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def set_input_size(
        self, image_size: int | Pair | None = None, window_size: Any = None, method: str = "bicubic"
    ) -> Any:
        """As in V1, but the bias of every offset stays what it is, and ``method`` has no effect.

        ``config.pretrained_window_sizes`` keeps the windows that the offsets are divided by.
        """
        units = self.config.bias_units
        super().set_input_size(image_size, window_size, method)
        if self.config.bias_units != units:
            is_square = all(height == width for height, width in units)
            self.config.pretrained_window_sizes = [unit[0] if is_square else unit for unit in units]
        return self

    def _resize_attention(self, attention: Any, window: Pair, method: str) -> None:
        """Nothing has to be resampled: the network has a bias for every offset."""


class SwinV2HFModel(SwinV2HFPreTrainedModel, SwinHFModel):
    """The Swin Transformer V2 without a head; arguments are those of :class:`~.modeling_swin_hf.SwinHFModel`."""

    stage_class = SwinV2HFStage


SwinV2HFPreTrainedModel.trunk_class = SwinV2HFModel


class SwinV2HFForImageClassification(SwinV2HFPreTrainedModel, SwinHFForImageClassification):
    """Swin Transformer V2 with a linear classifier on the mean of the last stage's tokens."""


class SwinV2HFForMaskedImageModeling(SwinV2HFPreTrainedModel, SwinHFForMaskedImageModeling):
    """Swin Transformer V2 that predicts masked pixels (SimMIM), normalised by their neighbourhood."""


class SwinV2HFBackbone(SwinV2HFPreTrainedModel, SwinHFBackbone):
    """Swin Transformer V2 as a pyramid of feature maps, each with a LayerNorm if ``config.norm_features``.

    A window that covers the map is not shifted, as in the classifier and in transformers' ``Swinv2Backbone``.
    """

    always_partition = False

    def __init__(self, config: SwinV2HFConfig) -> None:
        super().__init__(config)
        if not config.norm_features:
            self.hidden_states_norms = nn.ModuleDict({name: nn.Identity() for name in self.out_features})


__all__ = [
    "SwinV2HFBackbone",
    "SwinV2HFForImageClassification",
    "SwinV2HFForMaskedImageModeling",
    "SwinV2HFModel",
    "SwinV2HFPreTrainedModel",
]
