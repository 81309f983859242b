"""Swin Transformer (https://arxiv.org/abs/2103.14030), top to bottom: embed, attend in windows, merge, repeat.

The network is a pyramid of stages. A stage is a sequence of blocks that attend within windows, every second one
with the windows shifted; between stages, patches merge two by two, so that the map halves and the channels double.

``forward`` is pure: nothing is assigned to ``self``, and what depends on sizes alone comes from the functions of
``windows.py``. Any height and width can be run at any time.

Shape legend:
    B batch, H and W height and width of a map in tokens, L = H * W, C channels of a stage,
    nW windows of a map, N tokens of a window, h heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .attention import BACKENDS, SwinHFAttention
from .configuration_swin_hf import SwinHFConfig
from .windows import Pair, pad_to_windows, resize_bias_table, window_geometry

logger = logging.get_logger(__name__)


@dataclass
class SwinHFModelOutput(ModelOutput):
    """Output of :class:`SwinHFModel`.

    Args:
        last_hidden_state: Tokens of the last stage, ``(B, L, C)``.
        pooler_output: Their mean, ``(B, C)``; None without a pooling layer.
        hidden_states: Patch embeddings and the output of each stage after merging, ``(B, L, C)`` each.
        attentions: Probabilities of the last block of each stage, ``(B * nW, h, N, N)`` each.
        reshaped_hidden_states: ``hidden_states`` as maps, ``(B, C, H, W)`` each.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class SwinHFImageClassifierOutput(ModelOutput):
    """Output of :class:`SwinHFForImageClassification`.

    Args:
        loss: Scalar, if labels were given.
        logits: ``(B, num_labels)``.
        hidden_states: As in :class:`SwinHFModelOutput`, like the two below.
        attentions: See there.
        reshaped_hidden_states: See there.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class SwinHFMaskedImageModelingOutput(ModelOutput):
    """Output of :class:`SwinHFForMaskedImageModeling`.

    Args:
        loss: Scalar, if a mask was given.
        reconstruction: Predicted pixels, ``(B, channels, height, width)`` of the image.
        hidden_states: As in :class:`SwinHFModelOutput`, like the two below.
        attentions: See there.
        reshaped_hidden_states: See there.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


class SwinHFEmbeddings(nn.Module):
    """Patch partition and linear embedding (section 3.1) in one convolution, and a LayerNorm.

    Args:
        config: Configuration of the model.
        use_mask_token: Whether there is a token for masked patches (SimMIM).
    """

    def __init__(self, config: SwinHFConfig, use_mask_token: bool = False) -> None:
        super().__init__()
        dim, patch = config.embed_dim, config.patch_hw
        self.grid = config.grid_hw
        self.patch_embeddings = nn.Conv2d(config.num_channels, dim, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim)) if use_mask_token else None
        positions = self.grid[0] * self.grid[1]
        self.position_embeddings = (
            nn.Parameter(torch.empty(1, positions, dim)) if config.use_absolute_embeddings else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Embed images ``(B, channels, height, width)`` as maps ``(B, H, W, C)``.

        ``bool_masked_pos``, ``(B, L)`` or ``(B, H, W)``, is True where the mask token replaces a patch.
        """
        x = self.patch_embeddings(self._pad_to_patches(pixel_values))  # B, C, H, W
        x = self.norm(x.permute(0, 2, 3, 1))  # B, H, W, C
        if bool_masked_pos is not None:
            mask = _as_grid(bool_masked_pos, x.shape[:3]).to(x.dtype).unsqueeze(-1)  # B, H, W, 1
            x = x * (1 - mask) + self.mask_token.to(x.dtype) * mask
        if self.position_embeddings is not None:
            x = x + resize_position_embeddings(self.position_embeddings, self.grid, (x.shape[1], x.shape[2]))
        return self.dropout(x)

    def _pad_to_patches(self, pixel_values: Tensor) -> Tensor:
        """Append rows and columns of zeros until whole patches fit."""
        (height, width), (rows, columns) = pixel_values.shape[-2:], self.patch_embeddings.kernel_size
        bottom, right = -height % rows, -width % columns
        return F.pad(pixel_values, (0, right, 0, bottom)) if bottom or right else pixel_values


class SwinHFDropPath(nn.Module):
    """Stochastic depth (https://arxiv.org/abs/1603.09382): drop a residual branch for some samples of a batch.

    Args:
        rate: Probability of dropping, in ``[0, 1)``; the kept branches are scaled by ``1 / (1 - rate)``.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole samples of ``(B, ...)`` in training, nothing in evaluation."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = torch.empty(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * (kept / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class SwinHFMLP(nn.Module):
    """Two Linear layers with an activation between, ``mlp_ratio`` wide.

    Args:
        config: Configuration of the model.
        dim: Channels, C.
    """

    def __init__(self, config: SwinHFConfig, dim: int) -> None:
        super().__init__()
        hidden = int(dim * config.mlp_ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., C)`` to ``(..., C)``."""
        x = self.dropout(self.act(self.fc1(x)))
        return self.dropout(self.fc2(x))


class SwinHFBlock(GradientCheckpointingLayer):
    """A Swin Transformer block, equation 3 of the paper: W-MSA or SW-MSA, then an MLP, each a residual branch.

    Args:
        config: Configuration of the model.
        stage: Position of the stage, from 0.
        block: Position of the block in its stage, from 0; odd ones shift their windows.
        always_partition: See :func:`~.windows.window_geometry`.
    """

    def __init__(self, config: SwinHFConfig, stage: int, block: int, always_partition: bool = False) -> None:
        super().__init__()
        dim, eps = config.stage_dims[stage], config.layer_norm_eps
        self.window = config.stage_windows[stage]
        self.shifted = block % 2 == 1
        self.shift_per_axis = config.shift_per_axis
        self.always_partition = always_partition
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = SwinHFAttention(config, dim, config.num_heads[stage], self.window)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = SwinHFMLP(config, dim)
        self.drop_path = SwinHFDropPath(config.drop_path_rates[stage][block])

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """Map ``(B, H, W, C)`` to the same shape, and attention probabilities ``(B * nW, h, N, N)`` or None."""
        _, height, width, _ = x.shape
        geometry = window_geometry(
            (height, width),
            self.window,
            self.shifted,
            shift_per_axis=self.shift_per_axis,
            always_partition=self.always_partition,
        )
        y = pad_to_windows(self.norm1(x), geometry)  # B, Hp, Wp, C
        y, probabilities = self.attention(y, geometry, output_attentions)  # B, Hp, Wp, C
        x = x + self.drop_path(self.dropout(y[:, :height, :width]))  # B, H, W, C
        x = x + self.drop_path(self.mlp(self.norm2(x)))  # B, H, W, C
        return x, probabilities


class SwinHFPatchMerging(nn.Module):
    """Patch merging (section 3.1): 2x2 neighbours are concatenated, normalised, and projected from 4C to 2C.

    Args:
        config: Configuration of the model.
        dim: Channels before merging, C.
    """

    def __init__(self, config: SwinHFConfig, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=config.layer_norm_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, H, W, C)`` to ``(B, ceil(H / 2), ceil(W / 2), 2C)``; an odd side is padded with zeros."""
        _, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # B, H/2, 2 rows, W/2, 2 columns, C
        # The reference goes down the columns first: (0, 0), (1, 0), (0, 1), (1, 1).
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # B, H/2, W/2, 4C
        return self.reduction(self.norm(x))


class SwinHFStage(nn.Module):
    """A sequence of blocks on one map, and the merging that leads to the next.

    Args:
        config: Configuration of the model.
        stage: Position of the stage, from 0; the last one does not merge.
        always_partition: See :func:`~.windows.window_geometry`.
    """

    def __init__(self, config: SwinHFConfig, stage: int, always_partition: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinHFBlock(config, stage, block, always_partition) for block in range(config.depths[stage])
        )
        is_last = stage == config.num_layers - 1
        self.downsample = None if is_last else SwinHFPatchMerging(config, config.stage_dims[stage])

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """Run the blocks on ``(B, H, W, C)``; merging is left to the caller, who may want the map before it.

        Returns:
            The map ``(B, H, W, C)`` before merging, and the probabilities of the last block or None.
        """
        probabilities = None
        for block in self.blocks:
            x, probabilities = block(x, output_attentions and block is self.blocks[-1])
        return x, probabilities


class SwinHFPreTrainedModel(PreTrainedModel):
    """What all models of the family share: initialisation, loading, attention backends, resizing."""

    config: SwinHFConfig
    config_class = SwinHFConfig
    base_model_prefix = "swin"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _input_embed_layer = "patch_embeddings"
    _no_split_modules = ["SwinHFEmbeddings", "SwinHFBlock", "SwinHFPatchMerging"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Microsoft's initialisation; written with ``transformers.initialization``, which spares loaded weights."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):  # torch's own, which the reference leaves in place
            bound = (module.in_channels * module.kernel_size[0] * module.kernel_size[1]) ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SwinHFAttention):
            init.trunc_normal_(module.relative_position_bias_table, std=std)
        elif isinstance(module, SwinHFEmbeddings):
            for parameter in (module.mask_token, module.position_embeddings):
                if parameter is not None:
                    init.trunc_normal_(parameter, std=std)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation in BACKENDS:
            return attn_implementation
        if attn_implementation is not None and "/" in attn_implementation:
            # transformers would download and run a kernel of that name; a config.json must not be able to ask for it.
            raise ValueError(
                f"attn_implementation {attn_implementation!r} is refused; choose one of {BACKENDS}"
            )
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def resize_windows(
        self,
        image_size: int | Pair | None = None,
        window_size: Any = None,
        method: str = "bicubic",
    ) -> "SwinHFPreTrainedModel":
        """Change the training image size and the windows of a live model, keeping what it has learned.

        Bias tables are resampled for the new windows and absolute position embeddings for the new image.

        Args:
            image_size: New image size in pixels, if it changes.
            window_size: New windows, in any form that the configuration takes, if they change.
            method: How bias tables are resampled, see :func:`~.windows.resize_bias_table`.

        Returns:
            The model itself.

        Raises:
            ValueError: If a size is out of range, or the image is smaller than one patch.
        """
        changes = {"image_size": image_size, "window_size": window_size}
        target = SwinHFConfig(
            **{**self.config.to_dict(), **{k: v for k, v in changes.items() if v is not None}}
        )
        if target.image_hw[0] < target.patch_hw[0] or target.image_hw[1] < target.patch_hw[1]:
            raise ValueError(
                f"image_size {target.image_size} is smaller than one patch of {target.patch_size}; "
                "choose a larger image or resample the patches first"
            )
        base = self.base_model
        for stage, window in zip(base.stages, target.stage_windows, strict=True):
            for block in stage.blocks:
                attention = block.attention
                table = resize_bias_table(
                    attention.relative_position_bias_table, attention.window, window, method
                )
                attention.relative_position_bias_table = _like(attention.relative_position_bias_table, table)
                attention.window = block.window = window
        embeddings = base.embeddings
        if embeddings.position_embeddings is not None:
            positions = resize_position_embeddings(
                embeddings.position_embeddings, embeddings.grid, target.grid_hw
            )
            embeddings.position_embeddings = _like(embeddings.position_embeddings, positions.flatten(1, 2))
        embeddings.grid = target.grid_hw
        self.config.image_size, self.config.window_size = target.image_size, target.window_size
        return self


class SwinHFModel(SwinHFPreTrainedModel):
    """The Swin Transformer without a head.

    Args:
        config: Configuration.
        add_pooling_layer: Whether the output has the mean of the last stage's tokens.
        use_mask_token: Whether patches can be masked (SimMIM).
        always_partition: Windows as detection backbones cut them, see :func:`~.windows.window_geometry`.
        add_final_norm: Whether the last stage is followed by a LayerNorm; backbones have their own.
    """

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
        self.stages = nn.ModuleList(
            SwinHFStage(config, stage, always_partition) for stage in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if add_final_norm else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SwinHFModelOutput:
        """Run images of any height and width through the stages.

        Args:
            pixel_values: Images, ``(B, channels, height, width)``, normalised as the image processor does.
            bool_masked_pos: True where a patch is masked, ``(B, L)`` or ``(B, H, W)`` of the patch grid.
            output_attentions: Whether to return the attention of the last block of each stage.
            output_hidden_states: Whether to return the maps of all stages.
            kwargs: Other keywords of transformers, of no effect here.

        Raises:
            ValueError: If there are no images, if they are not 4-D, have another number of channels, or do not
                fit the mask.
        """
        output_attentions, output_hidden_states = _requested(
            self.config, output_attentions, output_hidden_states
        )
        x = self.embed(pixel_values, bool_masked_pos)  # B, H, W, C
        maps, attentions = [x], []
        for stage in self.stages:
            x, probabilities = stage(x, output_attentions)  # B, H, W, C
            attentions.append(probabilities)
            x = x if stage.downsample is None else stage.downsample(x)  # B, H/2, W/2, 2C
            maps.append(x)
        x = x if self.norm is None else self.norm(x)  # B, H, W, C
        last_hidden_state = x.flatten(1, 2)  # B, L, C
        return SwinHFModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state.mean(dim=1) if self.add_pooling_layer else None,
            attentions=tuple(attentions) if output_attentions else None,
            **_hidden_states(maps, output_hidden_states),
        )

    def embed(self, pixel_values: Tensor | None, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Check images and embed their patches, ``(B, H, W, C)``."""
        if pixel_values is None:
            raise ValueError("pixel_values is missing; give images of shape (batch, channels, height, width)")
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; give (batch, channels, height, width), "
                "for one image image.unsqueeze(0)"
            )
        if pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has {pixel_values.shape[1]} channels but the model takes num_channels "
                f"{self.config.num_channels}; convert the images, or load the model with num_channels="
                f"{pixel_values.shape[1]}"
            )
        if bool_masked_pos is not None and self.embeddings.mask_token is None:
            raise ValueError(
                "bool_masked_pos was given but the model has no mask token; build it with use_mask_token=True"
            )
        return self.embeddings(
            pixel_values.to(self.embeddings.patch_embeddings.weight.dtype), bool_masked_pos
        )


class SwinHFForImageClassification(SwinHFPreTrainedModel):
    """Swin Transformer with a linear classifier on the mean of the last stage's tokens.

    Args:
        config: Configuration; ``num_labels`` sizes the classifier, 0 leaves it out.
    """

    def __init__(self, config: SwinHFConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.swin = SwinHFModel(config)
        self.classifier = (
            nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SwinHFImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: Images, ``(B, channels, height, width)``.
            labels: ``(B,)`` class numbers; ``(B, num_labels)`` floats for several labels an image; floats for
                regression. Decides the loss as ``config.problem_type`` does in transformers.
            output_attentions: See :class:`SwinHFModel`.
            output_hidden_states: See :class:`SwinHFModel`.
            kwargs: Passed on to the loss.
        """
        outputs = self.swin(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)  # B, num_labels
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SwinHFImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class SwinHFForMaskedImageModeling(SwinHFPreTrainedModel):
    """Swin Transformer that predicts masked pixels: SimMIM (https://arxiv.org/abs/2111.09886).

    Args:
        config: Configuration; ``encoder_stride`` is the product of patch size and all merging.

    Raises:
        ValueError: If ``encoder_stride`` is not that product.
    """

    def __init__(self, config: SwinHFConfig) -> None:
        super().__init__(config)
        stride = tuple(side * 2 ** (config.num_layers - 1) for side in config.patch_hw)
        if stride != (config.encoder_stride, config.encoder_stride):
            raise ValueError(
                f"encoder_stride is {config.encoder_stride} but patches of {config.patch_hw} in {config.num_layers} "
                f"stages shrink an image by {stride}; the decoder needs a square patch and encoder_stride={stride[0]}"
            )
        self.swin = SwinHFModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SwinHFMaskedImageModelingOutput:
        """Reconstruct images from the patches that are not masked.

        Args:
            pixel_values: Images, ``(B, channels, height, width)``, any rectangle.
            bool_masked_pos: True or 1 where a patch is masked, ``(B, L)`` or ``(B, H, W)`` of the patch grid; the
                loss is the mean L1 distance over the pixels of these patches.
            output_attentions: See :class:`SwinHFModel`.
            output_hidden_states: See :class:`SwinHFModel`.
            kwargs: Other keywords of transformers, of no effect here.
        """
        outputs = self.swin(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        batch, _, height, width = pixel_values.shape
        stride = self.config.encoder_stride
        rows, columns = -(-height // stride), -(-width // stride)
        x = outputs.last_hidden_state.transpose(1, 2).unflatten(2, (rows, columns))  # B, C, H, W
        reconstruction = self.decoder(x)[..., :height, :width]  # B, channels, height, width

        loss = None
        if bool_masked_pos is not None:
            patch = self.config.patch_hw
            grid = (batch, -(-height // patch[0]), -(-width // patch[1]))
            mask = _as_grid(bool_masked_pos, grid)
            mask = mask.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[
                :, None, :height, :width
            ]
            target = pixel_values.to(reconstruction.dtype)
            if self.config.norm_targets is not None:
                target = normalise_locally(target, self.config.norm_targets)
            distance = (target - reconstruction).abs() * mask
            loss = distance.sum() / (mask.sum() + 1e-5) / self.config.num_channels
        return SwinHFMaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class SwinHFBackbone(BackboneMixin, SwinHFPreTrainedModel):
    """Swin Transformer as a pyramid of feature maps for detection and segmentation heads.

    Follows transformers' ``SwinBackbone``: the maps before merging, a LayerNorm for each, windows always partitioned.
    Stages past the last requested one do not train, and run only when all hidden states or attentions are asked for.

    Args:
        config: Configuration; ``out_features`` or ``out_indices`` name the stages.
    """

    def __init__(self, config: SwinHFConfig) -> None:
        super().__init__(config)
        self.num_features = [config.embed_dim, *config.stage_dims]
        self.swin = SwinHFModel(config, add_pooling_layer=False, always_partition=True, add_final_norm=False)
        self.hidden_states_norms = nn.ModuleDict(
            {
                name: nn.LayerNorm(channels, eps=config.layer_norm_eps)
                for name, channels in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()
        self._freeze_unused()

    def _freeze_unused(self) -> None:
        """Take what no feature map depends on out of training; DDP would wait for its gradients in vain."""
        last = max(self.out_indices, key=lambda index: index % len(self.stage_names)) % len(self.stage_names)
        for number, stage in enumerate(self.swin.stages, start=1):
            unused = stage if number > last else stage.downsample if number == last else None
            if unused is not None:
                unused.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Compute the requested feature maps.

        Args:
            pixel_values: Images, ``(B, channels, height, width)``.
            output_hidden_states: Whether to return the maps of all stages, before merging and without norm.
            output_attentions: Whether to return the attention of the last block of each stage.
            kwargs: Other keywords of transformers, of no effect here.

        Returns:
            ``feature_maps``, one ``(B, C, H, W)`` for each of ``out_features``.
        """
        output_attentions, output_hidden_states = _requested(
            self.config, output_attentions, output_hidden_states
        )
        complete = output_attentions or output_hidden_states
        x = self.swin.embed(pixel_values)  # B, H, W, C
        maps, attentions = {"stem": x}, []
        for number, stage in enumerate(self.swin.stages, start=1):
            if not complete and set(self.out_features) <= set(maps):
                break
            if number > 1:
                x = self.swin.stages[number - 2].downsample(x)  # B, H/2, W/2, 2C
            x, probabilities = stage(x, output_attentions)  # B, H, W, C
            attentions.append(probabilities)
            maps[f"stage{number}"] = x
        features = [self.hidden_states_norms[name](maps[name]) for name in self.out_features]
        return BackboneOutput(
            feature_maps=tuple(_channels_first(feature) for feature in features),
            hidden_states=tuple(_channels_first(x) for x in maps.values()) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def resize_position_embeddings(embeddings: Tensor, old: Pair, new: Pair) -> Tensor:
    """Interpolate position embeddings ``(1, L, C)`` of one grid for another, bicubic; ``(1, H, W, C)``."""
    maps = embeddings.unflatten(1, old)  # 1, H, W, C
    if old == new:
        return maps
    resized = F.interpolate(maps.permute(0, 3, 1, 2).float(), size=new, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(embeddings.dtype)


def normalise_locally(pixels: Tensor, side: int) -> Tensor:
    """Normalise each pixel by the mean and the unbiased variance of its neighbourhood (Swin V2's SimMIM targets).

    Args:
        pixels: ``(B, channels, height, width)``.
        side: Side of the neighbourhood in pixels, odd; what lies outside of the image does not count.
    """
    pool = {"kernel_size": side, "stride": 1, "padding": side // 2}
    mean = F.avg_pool2d(pixels, **pool, count_include_pad=False)
    square = F.avg_pool2d(pixels.square(), **pool, count_include_pad=False)
    count = F.avg_pool2d(torch.ones_like(pixels), **pool, count_include_pad=True) * side**2
    variance = (square - mean.square()).clamp(min=0) * (count / (count - 1))
    return (pixels - mean) / (variance + 1e-6).sqrt()


def _requested(
    config: SwinHFConfig, attentions: bool | None, hidden_states: bool | None
) -> tuple[bool, bool]:
    """What a call asks for, else the configuration."""
    return (
        bool(config.output_attentions if attentions is None else attentions),
        bool(config.output_hidden_states if hidden_states is None else hidden_states),
    )


def _hidden_states(maps: list[Tensor], wanted: bool) -> dict[str, tuple[Tensor, ...] | None]:
    """Maps ``(B, H, W, C)`` in the two forms that transformers returns; the second is computed from the first."""
    if not wanted:
        return {"hidden_states": None, "reshaped_hidden_states": None}
    return {
        "hidden_states": tuple(x.flatten(1, 2) for x in maps),
        "reshaped_hidden_states": tuple(_channels_first(x) for x in maps),
    }


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _as_grid(mask: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """View a mask as ``(B, H, W)``.

    Raises:
        ValueError: If it has another number of patches; the message gives both shapes.
    """
    batch, height, width = grid
    if tuple(mask.shape) not in ((batch, height * width), (batch, height, width)):
        raise ValueError(
            f"bool_masked_pos has shape {tuple(mask.shape)}; the images have a grid of {height}x{width} patches, so "
            f"give ({batch}, {height * width}) or ({batch}, {height}, {width})"
        )
    return mask.reshape(batch, height, width)


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


__all__ = [
    "SwinHFBackbone",
    "SwinHFForImageClassification",
    "SwinHFForMaskedImageModeling",
    "SwinHFModel",
    "SwinHFPreTrainedModel",
]
