"""Swin Transformer (https://arxiv.org/abs/2103.14030), top to bottom: embed, attend in windows, merge, repeat.

A stage is a sequence of blocks that attend within windows, every second one with the windows shifted; between stages,
patches merge two by two: the map halves and the channels double. ``forward`` is pure: nothing is assigned to ``self``,
and what depends on sizes alone comes from ``windows.py``. Any height and width can be run at any time. Stages and
blocks are counted from 0.

Shape legend:
    B batch, H and W height and width of a map in tokens, Hp and Wp the same padded to whole windows, L = H * W,
    C channels of a stage, nW windows of a map, N tokens of a window, h heads, d channels of a head (C = h * d).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .attention import BackendMixin, attend, attend_fused, choose_backend, cut, in_parts, linear, look_up, put_back
from .configuration_swin_hf import SwinHFConfig
from .inputs import check_images, masked_distance, pad_to_patches, replace_masked
from .outputs import Record, SwinHFImageClassifierOutput, SwinHFMaskedImageModelingOutput, SwinHFModelOutput
from .resizing import ResizableMixin, check_stride, resize_decoder, resize_position_embeddings
from .timm_verbs import TimmVerbs
from .windows import Pair, WindowGeometry, gather_neighbours, pad_to_windows, window_geometry


class SwinHFEmbeddings(nn.Module):
    """Patch partition and linear embedding (section 3.1) in one convolution, and a LayerNorm."""

    def __init__(self, config: SwinHFConfig, use_mask_token: bool = False) -> None:
        super().__init__()
        dim, patch = config.embed_dim, config.patch_hw
        self.grid = config.grid_hw
        self.patch_embeddings = nn.Conv2d(config.num_channels, dim, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim)) if use_mask_token else None
        positions = torch.empty(1, self.grid[0] * self.grid[1], dim) if config.use_absolute_embeddings else None
        self.position_embeddings = None if positions is None else nn.Parameter(positions)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Embed images ``(B, channels, height, width)`` as maps ``(B, H, W, C)``.

        ``bool_masked_pos``, ``(B, L)`` or ``(B, H, W)``, is True where the mask token replaces a patch.
        """
        x: Tensor = self.patch_embeddings(pad_to_patches(pixel_values, self.patch_embeddings.kernel_size))  # B, C, H, W
        x = self.norm(x.permute(0, 2, 3, 1))  # B, H, W, C
        if bool_masked_pos is not None:
            x = replace_masked(x, bool_masked_pos, self.mask_token)
        if self.position_embeddings is not None:
            x = x + resize_position_embeddings(self.position_embeddings, self.grid, (x.shape[1], x.shape[2]))
        return self.dropout(x)


class SwinHFAttention(nn.Module):
    """W-MSA and SW-MSA (section 3.2): multi-head self-attention within windows, with a relative position bias."""

    def __init__(self, config: SwinHFConfig, dim: int, num_heads: int, window: Pair) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.window = window  # that the table is made for; a small map is attended with a smaller one
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
        """Map ``(B, Hp, Wp, C)`` to the same shape, and attention probabilities ``(B * nW, h, N, N)`` or None."""
        dropout = self.dropout if self.training else 0.0
        backend = "eager"  # which has the probabilities
        if not output_attentions:
            backend = choose_backend(self.config, x.device, x.dtype, self.head_dim, dropout, geometry.window)
        if backend == "triton":
            return self.proj(attend_fused(self, self.qkv(x), geometry)), None
        qkv = self.project(cut(x, geometry))  # three of B * nW, N, h, d
        windows, probabilities = attend(self, qkv, geometry, backend, dropout)  # B * nW, N, h, d
        return linear(self.proj, put_back(windows, geometry)), probabilities if output_attentions else None

    def project(self, windows: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, ``(B * nW, N, h, d)`` each, of windows ``(B * nW, N, C)``."""
        return linear(self.qkv, windows).unflatten(-1, (3, self.num_heads, -1)).unbind(2)

    def relative_position_bias(self, window: Pair) -> Tensor:
        """The bias B of equation 4 for every pair of tokens of a window, ``(1, h, N, N)``."""
        return look_up(self.relative_position_bias_table, window, self.window)

    def bias_sources(self) -> tuple[Pair, tuple[Tensor, ...]]:
        """What the bias of a window follows from: a size, and parameters."""
        return self.window, (self.relative_position_bias_table,)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window={self.window[0]}x{self.window[1]}"


class SwinHFDropPath(nn.Module):
    """Stochastic depth (https://arxiv.org/abs/1603.09382): drop a residual branch with probability ``rate``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole samples of ``(B, ...)`` in training and scale the others up; nothing happens in evaluation."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = torch.empty(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * (kept / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class SwinHFMLP(nn.Module):
    """Two Linear layers with an activation between, ``mlp_ratio`` wide."""

    def __init__(self, config: SwinHFConfig, dim: int) -> None:
        super().__init__()
        hidden = int(dim * config.mlp_ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., C)`` to ``(..., C)``."""
        x = self.dropout(linear(self.fc1, x, self.act))  # ..., mlp_ratio * C
        return self.dropout(linear(self.fc2, x))  # ..., C


class SwinHFBlock(GradientCheckpointingLayer):
    """A Swin Transformer block, equation 3 of the paper: W-MSA, or SW-MSA in odd blocks, then an MLP, both residual."""

    attention_class: Any = SwinHFAttention

    def __init__(self, config: SwinHFConfig, stage: int, block: int, always_partition: bool = False) -> None:
        super().__init__()
        dim, eps = config.stage_dims[stage], config.layer_norm_eps
        self.window = config.stage_windows[stage]
        self.shifted = block % 2 == 1
        self.rules = {"shift_per_axis": config.shift_per_axis, "always_partition": always_partition}
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = self.attention_class(config, dim, config.num_heads[stage], self.window)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = SwinHFMLP(config, dim)
        self.drop_path = SwinHFDropPath(config.drop_path_rates[stage][block])

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map ``(B, H, W, C)`` to the same shape, and attention probabilities ``(B * nW, h, N, N)`` or None."""
        _, height, width, _ = x.shape
        geometry = window_geometry((height, width), self.window, self.shifted, **self.rules)
        y = pad_to_windows(self.norm1(x), geometry)  # B, Hp, Wp, C
        y, probabilities = self.attention(y, geometry, output_attentions)  # B, Hp, Wp, C
        x = x + self.drop_path(self.dropout(y[:, :height, :width]))  # B, H, W, C
        x = x + self.drop_path(self.mlp(self.norm2(x)))  # B, H, W, C
        return x, probabilities


class SwinHFPatchMerging(nn.Module):
    """Patch merging (section 3.1): 2x2 neighbours are concatenated, normalised, and projected from 4C to 2C."""

    def __init__(self, config: SwinHFConfig, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=config.layer_norm_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, H, W, C)`` to ``(B, ceil(H / 2), ceil(W / 2), 2C)``; an odd side is padded with zeros."""
        return linear(self.reduction, self.norm(gather_neighbours(x)))


class SwinHFStage(nn.Module):
    """A sequence of blocks on one map, and the merging that leads to the next stage; the last one has none."""

    block_class, merging_class = SwinHFBlock, SwinHFPatchMerging

    def __init__(self, config: SwinHFConfig, stage: int, always_partition: bool = False) -> None:
        super().__init__()
        blocks = [self.block_class(config, stage, block, always_partition) for block in range(config.depths[stage])]
        self.blocks = nn.ModuleList(blocks)
        is_last, dim = stage == config.num_layers - 1, config.stage_dims[stage]
        self.downsample = None if is_last else self.merging_class(config, dim)

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map ``(B, H, W, C)`` to the same shape before merging, and the last block's probabilities or None."""
        probabilities = None
        for block in self.blocks:
            x, probabilities = block(x, output_attentions and block is self.blocks[-1])
        return x, probabilities


class SwinHFPreTrainedModel(ResizableMixin, BackendMixin, PreTrainedModel):
    """What all models share: initialisation, names without weight decay, and mixins for loading, resizing, backends."""

    config: SwinHFConfig
    config_class = SwinHFConfig
    trunk_class: Any  # the model below the heads
    undecayed: tuple[str, ...] = ("relative_position_bias_table", "position_embeddings", "mask_token")
    base_model_prefix = "swin"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # as all vision models have it
    supports_gradient_checkpointing = True
    _input_embed_layer = "patch_embeddings"
    _no_split_modules = ["SwinHFEmbeddings", "SwinHFBlock", "SwinHFPatchMerging"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as Microsoft does; ``transformers.initialization`` leaves loaded weights alone."""
        if isinstance(module, nn.Conv2d):  # torch's default, as in the reference
            bound = (module.in_channels * module.kernel_size[0] * module.kernel_size[1]) ** -0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | SwinHFAttention | SwinHFEmbeddings):
            std = self.config.initializer_range  # of weights, bias tables, mask token and position embeddings
            for name, parameter in module.named_parameters(recurse=False):
                init.zeros_(parameter) if name == "bias" else init.trunc_normal_(parameter, std=std)


class SwinHFModel(SwinHFPreTrainedModel):
    """The Swin Transformer without a head.

    Args:
        config: Configuration.
        add_pooling_layer: Whether the output has the mean of the last stage's tokens.
        use_mask_token: Whether patches can be masked (SimMIM).
        always_partition: Windows as detection backbones cut them, see :func:`~.windows.window_geometry`.
        add_final_norm: Whether the last stage is followed by a LayerNorm; backbones have their own.
    """

    stage_class: Any = SwinHFStage

    def __init__(
        self,
        config: SwinHFConfig,
        add_pooling_layer: bool = True,
        use_mask_token: bool = False,
        always_partition: bool = False,
        add_final_norm: bool = True,
    ) -> None:
        super().__init__(config)
        config.check_sizes()
        self.num_features = config.hidden_size
        self.add_pooling_layer = add_pooling_layer
        self.embeddings = SwinHFEmbeddings(config, use_mask_token)
        stages = (self.stage_class(config, stage, always_partition) for stage in range(config.num_layers))
        self.stages: Any = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if add_final_norm else None
        self.post_init()

    def run(
        self, pixel_values: Tensor | None, record: Record, mask: Tensor | None = None, num_stages: int | None = None
    ) -> Tensor:
        """Embed, attend, merge, repeat: the one loop over the stages, which all models of the family share.

        ``record`` sees every map on the way. Returns the map of the last of ``num_stages``, ``(B, H, W, C)``.
        """
        pixel_values = check_images(pixel_values, self.config)
        x = self.embeddings(pixel_values.to(self.embeddings.patch_embeddings.weight.dtype), mask)  # B, H, W, C
        x = record.keep(x, 0)
        stages = self.stages[:num_stages]
        for number, stage in enumerate(stages, start=1):
            x, attention = in_parts(stage, x, self.config.mlp_ratio, record.wants_attentions)  # B, H, W, C
            x = record.keep(x, number, attention)
            if number < len(stages):
                x = record.keep_merged(stage.downsample(x))  # B, H/2, W/2, 2C
        return x

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> SwinHFModelOutput:
        """Run images of any height and width through the stages.

        Args:
            pixel_values: Images, ``(B, channels, height, width)``, normalised as the image processor does.
            output_attentions: Whether to return the attention of the last block of each stage.
            output_hidden_states: Whether to return the maps of all stages; or the numbers of those to return.
            kwargs: ``bool_masked_pos``, True where a patch is masked, ``(B, L)`` or ``(B, H, W)`` of the patch grid,
                for a model with a mask token; not declared, because transformers' tools feed a mask to a forward
                that declares it. Other keywords have no effect.

        Raises:
            ValueError: If there are no images, they are not 4-D, have other channels, or do not fit the mask.
        """
        record = Record(self.config, output_attentions, output_hidden_states)
        x = self.run(pixel_values, record, kwargs.get("bool_masked_pos"))  # B, H, W, C
        x = x if self.norm is None else self.norm(x)  # B, H, W, C
        tokens = x.flatten(1, 2)  # B, L, C
        pooled = tokens.mean(dim=1) if self.add_pooling_layer else None  # B, C
        return SwinHFModelOutput(last_hidden_state=tokens, pooler_output=pooled, **record.states())


SwinHFPreTrainedModel.trunk_class = SwinHFModel


class SwinHFForImageClassification(TimmVerbs, SwinHFPreTrainedModel):
    """Swin Transformer with a linear classifier on the mean of the last stage's tokens; none for ``num_labels=0``."""

    def __init__(self, config: SwinHFConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.swin = self.trunk_class(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> SwinHFImageClassifierOutput:
        """Classify images ``(B, channels, height, width)``; ``kwargs`` go to the loss.

        ``labels``, class numbers ``(B,)``, floats ``(B, num_labels)`` for several labels an image, or floats for
        regression, decide the loss as ``config.problem_type`` does in transformers.
        """
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        outputs = self.swin(pixel_values, **asked, return_dict=True)
        logits = self.classifier(outputs.pooler_output)  # B, num_labels
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SwinHFImageClassifierOutput(loss=loss, logits=logits, **outputs.states())


class SwinHFForMaskedImageModeling(SwinHFPreTrainedModel):
    """Swin Transformer that predicts masked pixels: SimMIM (https://arxiv.org/abs/2111.09886)."""

    def __init__(self, config: SwinHFConfig) -> None:
        super().__init__(config)
        self.swin = self.trunk_class(config, add_pooling_layer=False, use_mask_token=True)
        stride = config.encoder_stride  # product of patch size and all merging
        convolution = nn.Conv2d(config.hidden_size, stride**2 * config.num_channels, kernel_size=1)
        self.decoder = nn.Sequential(convolution, nn.PixelShuffle(stride))
        self.post_init()

    def _resize_head(self, target: SwinHFConfig) -> None:
        check_stride(target)
        resize_decoder(self.decoder, target.num_channels, target.encoder_stride)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> SwinHFMaskedImageModelingOutput:
        """Reconstruct images from the patches that are not masked.

        ``pixel_values`` are ``(B, channels, height, width)``; ``bool_masked_pos``, ``(B, L)`` or ``(B, H, W)`` of the
        patch grid, is True where a patch is masked. The loss is the mean L1 distance over the pixels of these patches.
        """
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        outputs = self.swin(pixel_values, bool_masked_pos=bool_masked_pos, **asked, return_dict=True)
        assert pixel_values is not None  # the model above has refused None
        height, width = pixel_values.shape[2:]
        rows, columns = self.config.stride_hw
        x = outputs.last_hidden_state.transpose(1, 2).unflatten(2, (-(-height // rows), -(-width // columns)))
        reconstruction = self.decoder(x)[..., :height, :width]  # B, channels, height, width
        loss = None
        if bool_masked_pos is not None:
            check_stride(self.config)
            loss = masked_distance(reconstruction, pixel_values, bool_masked_pos, self.config)
        return SwinHFMaskedImageModelingOutput(loss=loss, reconstruction=reconstruction, **outputs.states())


class SwinHFBackbone(BackboneMixin, SwinHFPreTrainedModel):
    """Swin Transformer as a pyramid of feature maps: transformers' ``SwinBackbone``.

    The maps are those before merging, each with a LayerNorm, windows are always partitioned. ``config.out_features``
    or ``out_indices`` name them. Later stages do not train, and run only when all states or attentions are wanted.
    """

    always_partition = True
    _left_out = r"(^|swin\.)norm\.(weight|bias)$"  # each map has a norm of its own

    def __init__(self, config: SwinHFConfig) -> None:
        super().__init__(config)
        self.num_features = [config.embed_dim, *config.stage_dims]
        self.swin = self.trunk_class(config, False, always_partition=self.always_partition, add_final_norm=False)
        maps = zip(self.out_features, self.channels, strict=True)
        norms = {name: nn.LayerNorm(channels, eps=config.layer_norm_eps) for name, channels in maps}
        self.hidden_states_norms = nn.ModuleDict(norms)
        self.post_init()
        # DDP waits for gradients of all parameters that train; those that no feature map depends on get none.
        last = max(map(self.stage_names.index, self.out_features))
        for number, stage in enumerate(self.swin.stages, start=1):
            unused = stage if number > last else stage.downsample if number == last else None
            if unused is not None:
                unused.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Compute a map ``(B, C, H, W)`` for each of ``out_features``; hidden states are before merging and norm."""
        norms = {self.stage_names.index(name): norm for name, norm in self.hidden_states_norms.items()}
        record = Record(self.config, output_attentions, output_hidden_states, merged=False, norms=norms)
        self.swin.run(pixel_values, record, num_stages=None if record.wants_all else max(norms))
        states = record.states()
        hidden_states, attentions = states["reshaped_hidden_states"], states["attentions"]
        return BackboneOutput(tuple(record.maps), hidden_states, attentions)  # type: ignore[arg-type]  # one map there


__all__ = [
    "SwinHFBackbone",
    "SwinHFForImageClassification",
    "SwinHFForMaskedImageModeling",
    "SwinHFModel",
    "SwinHFPreTrainedModel",
]
