"""Swin Transformer (https://arxiv.org/abs/2103.14030), top to bottom: embed, attend in windows, merge, repeat.

The network is a pyramid of stages. A stage is a sequence of blocks that attend within windows, every second one
with the windows shifted; between stages, patches merge two by two, so that the map halves and the channels double.

``forward`` is pure: nothing is assigned to ``self``, and what depends on sizes alone comes from the functions of
``windows.py``. Any height and width can be run at any time.

Shape legend:
    B batch, H and W height and width of a map in tokens, L = H * W, C channels of a stage,
    nW windows of a map, N tokens of a window, h heads.
"""

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, can_return_tuple

from .attention import BACKENDS, SwinHFAttention, images_at_once, is_exporting, linear
from .configuration_swin_hf import FREE_PARAMETERS, SwinHFConfig
from .windows import (
    Pair,
    channel_matrix,
    pad_to_windows,
    resample_patches,
    resize_bias_table,
    resize_position_embeddings,
    window_geometry,
)

logger = logging.get_logger(__name__)

# What a checkpoint of another task may lack, and what it may have to spare.
_HEADS = re.compile(r"(^|\.)(classifier|decoder|hidden_states_norms)\.|(^|\.)mask_token$")
# Sizes that weights can be adapted to on load, and the keywords that say where a checkpoint is.
_RESIZABLE = ("image_size", "patch_size", "num_channels", "window_size")
_LOCATION = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@contextmanager
def _no_conversion() -> Iterator[None]:
    """Keep transformers from telling a conversion service the name and token of a repository without safetensors."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


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
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor | None, ...] | None = None


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
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor | None, ...] | None = None


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
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor | None, ...] | None = None


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
        x: Tensor = self.patch_embeddings(self._pad_to_patches(pixel_values))  # B, C, H, W
        x = self.norm(x.permute(0, 2, 3, 1))  # B, H, W, C
        if bool_masked_pos is not None and self.mask_token is not None:
            mask = (
                _as_grid(bool_masked_pos, (x.shape[0], x.shape[1], x.shape[2])).to(x.dtype).unsqueeze(-1)
            )  # B, H, W, 1
            x = x * (1 - mask) + self.mask_token.to(x.dtype) * mask
        if self.position_embeddings is not None:
            x = x + resize_position_embeddings(self.position_embeddings, self.grid, (x.shape[1], x.shape[2]))
        x = self.dropout(x)
        return x

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
        x = self.dropout(linear(self.fc1, x, self.act))  # ..., mlp_ratio * C
        x = self.dropout(linear(self.fc2, x))  # ..., C
        return x


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
        return linear(self.reduction, self.norm(x))


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
        self.hidden = int(config.stage_dims[stage] * config.mlp_ratio)
        self.downsample = None if is_last else SwinHFPatchMerging(config, config.stage_dims[stage])

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """Run the blocks on ``(B, H, W, C)``; merging is left to the caller, who may want the map before it.

        Returns:
            The map ``(B, H, W, C)`` before merging, and the probabilities of the last block or None.
        """
        if not output_attentions:
            images = images_at_once(x, self.hidden, self)
            if images < x.shape[0]:
                return torch.cat([self(part)[0] for part in x.split(images)]), None
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
    input_modalities = ("image",)  # type: ignore[assignment]  # as all vision models have it
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

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation in BACKENDS:
            return attn_implementation
        if attn_implementation is not None and "/" in attn_implementation:
            # transformers would download and run a kernel of that name; a config.json must not be able to ask for it.
            raise ValueError(f"attn_implementation {attn_implementation!r} is refused; choose one of {BACKENDS}")
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        strict: bool = False,
        method: str = "bicubic",
        **kwargs: Any,
    ) -> Any:
        """Load a model as transformers does, adapt its weights to other sizes, and notice random layers.

        Args:
            pretrained_model_name_or_path: See transformers, like all that is not listed here.
            model_args: See there.
            config: See there. Where its sizes differ from those of the checkpoint, weights are adapted too.
            strict: Whether to refuse a checkpoint that does not fill the model or has layers to spare. Heads and mask
                tokens may be new, or left over, if another class saved the checkpoint. Without it, random layers are
                logged as an error.
            method: How bias tables are resampled, see :func:`~.windows.resize_bias_table`.
            kwargs: ``image_size``, ``window_size``, ``patch_size`` and ``num_channels`` adapt the weights, see
                :meth:`resize_windows`, :meth:`resize_patches` and :meth:`resize_channels`. ``use_safetensors`` is
                True unless it is given.

        Raises:
            ValueError: If the checkpoint does not fit under ``strict``, all keys listed, a size is out of range, or the
                index of a folder names a file outside of it.
        """
        _check_indices(pretrained_model_name_or_path, kwargs.get("subfolder"))
        output_loading_info = kwargs.pop("output_loading_info", False)
        changes = {name: kwargs.pop(name) for name in _RESIZABLE if name in kwargs}
        if isinstance(config, SwinHFConfig) and pretrained_model_name_or_path is not None:
            stored = cls._stored_config(pretrained_model_name_or_path, kwargs)
            if stored is not None:
                config, differences = _back_to(config, stored)
                changes = {**differences, **changes}
        if "patch_size" in changes:
            kwargs.pop("encoder_stride", None)  # follows from the patch
        kwargs.setdefault("use_safetensors", True)
        with _no_conversion():
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
            )
        model, info = loaded
        model._check_loading(info, strict, pretrained_model_name_or_path)
        if any(value is not None for value in changes.values()):
            if any(parameter.is_meta for parameter in model.parameters()):
                raise ValueError(
                    f"{sorted(changes)} cannot change while weights are offloaded; load without device_map, save the "
                    "resized model, and load that"
                )
            if changes.get("patch_size") is not None:
                model.resize_patches(changes["patch_size"])
            if changes.get("num_channels") is not None:
                model.resize_channels(changes["num_channels"])
            model.resize_windows(changes.get("image_size"), changes.get("window_size"), method)
        return (model, info) if output_loading_info else model

    @classmethod
    def _stored_config(cls, source: Any, kwargs: dict[str, Any]) -> SwinHFConfig | None:
        """Configuration beside the weights, None where there is none."""
        where = {name: kwargs[name] for name in _LOCATION if name in kwargs}
        try:
            return cls.config_class.from_pretrained(source, **where)
        except OSError:
            return None

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, once the files are found to hold what the model, yet without memory, asks for."""
        check_files([Path(path) for path in checkpoint_files or ()], model.config)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def _check_loading(self, info: dict[str, Any], strict: bool, source: Any) -> None:
        """Refuse, or log, what loading left random."""
        same_class = type(self).__name__ in (self.config.architectures or ())
        mismatched = {key for key, *_ in info["mismatched_keys"]}
        missing = {key for key in info["missing_keys"] if same_class or not _HEADS.search(key)}
        missing |= {key for key in mismatched if not _HEADS.search(key)}
        spare = set(info["unexpected_keys"]) if strict else set()
        spare = {key for key in spare if not _HEADS.search(key) and not self._is_left_out(key)}
        if strict and (missing or spare):
            raise ValueError(
                f"{source} does not fit {type(self).__name__}: {len(missing)} keys are missing and would be random"
                f"{_listed(missing)}; {len(spare)} have no place in the model{_listed(spare)}; make config.json agree "
                "with the weights (depths, embed_dim), or load without strict=True"
            )
        if missing:
            logger.error(
                f"{len(missing)} of {len(self.state_dict())} weights of {type(self).__name__} are not in {source} and "
                f"are random{_listed(missing)}; strict=True refuses such a checkpoint"
            )

    def _is_left_out(self, key: str) -> bool:
        """Whether this class has on purpose no place for a key of the family."""
        return False

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
        target = _changed(self.config, image_size=image_size, window_size=window_size)
        if target.image_hw[0] < target.patch_hw[0] or target.image_hw[1] < target.patch_hw[1]:
            raise ValueError(
                f"image_size {target.image_size} is smaller than one patch of {target.patch_size}; "
                "choose a larger image or resample the patches first"
            )
        base: Any = self.base_model
        for stage, window in zip(base.stages, target.stage_windows, strict=False):
            for block in stage.blocks:
                attention = block.attention
                table = resize_bias_table(attention.relative_position_bias_table, attention.window, window, method)
                attention.relative_position_bias_table = _like(attention.relative_position_bias_table, table)
                attention.window = block.window = window
        self._move_to_grid(target.grid_hw)
        self.config.image_size, self.config.window_size = target.image_size, target.window_size
        return self

    @torch.no_grad()
    def resize_patches(self, patch_size: int | Pair) -> "SwinHFPreTrainedModel":
        """Change the patch size of a live model: its kernels are resampled, see :func:`~.windows.resample_patches`.

        The decoder of a masked image model, whose stride follows from the patch, is interpolated.

        Args:
            patch_size: New patch size in pixels; a masked image model needs a square.

        Returns:
            The model itself.

        Raises:
            ValueError: If the size is out of range, or a masked image model is given a rectangle.
        """
        target = _changed(self.config, patch_size=patch_size)
        target.encoder_stride = target.patch_hw[0] * 2 ** (target.num_layers - 1)
        if isinstance(self, SwinHFForMaskedImageModeling):
            _check_stride(target)
            self._resize_decoder(target.num_channels, target.encoder_stride)
        embeddings: Any = self.base_model.embeddings
        convolution = embeddings.patch_embeddings
        convolution.weight = _like(convolution.weight, resample_patches(convolution.weight, target.patch_hw))
        convolution.kernel_size = convolution.stride = target.patch_hw
        self._move_to_grid(target.grid_hw)
        self.config.patch_size, self.config.encoder_stride = target.patch_size, target.encoder_stride
        return self

    @torch.no_grad()
    def resize_channels(self, num_channels: int) -> "SwinHFPreTrainedModel":
        """Change the image channels of a live model, see :func:`~.windows.channel_matrix` for the rule.

        Args:
            num_channels: New number of channels. A masked image model also reconstructs that many: the old ones in
                turn, or, if there are fewer, the mean of those that fall on the same place.

        Returns:
            The model itself.

        Raises:
            ValueError: If the number is not positive.
        """
        target = _changed(self.config, num_channels=num_channels)
        convolution: Any = self.get_input_embeddings()
        mix = channel_matrix(convolution.in_channels, num_channels).to(convolution.weight)
        convolution.weight = _like(convolution.weight, torch.einsum("oihw,ni->onhw", convolution.weight, mix))
        convolution.in_channels = num_channels
        if isinstance(self, SwinHFForMaskedImageModeling):
            self._resize_decoder(num_channels, target.encoder_stride)
        self.config.num_channels = num_channels
        return self

    def _move_to_grid(self, grid: Pair) -> None:
        """Interpolate absolute position embeddings, where there are any."""
        embeddings: Any = self.base_model.embeddings
        if embeddings.position_embeddings is not None:
            positions = resize_position_embeddings(embeddings.position_embeddings, embeddings.grid, grid)
            embeddings.position_embeddings = _like(embeddings.position_embeddings, positions.flatten(1, 2))
        embeddings.grid = grid


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
        self.stages: Any = nn.ModuleList(
            SwinHFStage(config, stage, always_partition) for stage in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if add_final_norm else None
        self.post_init()

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
            output_hidden_states: Whether to return the maps of all stages; or the numbers of those to return, the
                others being None in the tuple.
            kwargs: ``bool_masked_pos``, True where a patch is masked, ``(B, L)`` or ``(B, H, W)`` of the patch grid,
                for a model with a mask token. It is not in the signature because transformers' tools hand a mask to
                whatever names one. Other keywords of transformers have no effect.

        Raises:
            ValueError: If there are no images, if they are not 4-D, have another number of channels, or do not
                fit the mask.
        """
        output_attentions, wanted_states = _requested(self.config, output_attentions, output_hidden_states)
        x = self.embed(pixel_values, kwargs.get("bool_masked_pos"))  # B, H, W, C
        states, attentions = _States(wanted_states), []
        x = states.record(x)
        for stage in self.stages:
            x, probabilities = stage(x, output_attentions)  # B, H, W, C
            attentions.append(probabilities)
            x = x if stage.downsample is None else stage.downsample(x)  # B, H/2, W/2, 2C
            x = states.record(x)
        x = x if self.norm is None else self.norm(x)  # B, H, W, C
        last_hidden_state = x.flatten(1, 2)  # B, L, C
        return SwinHFModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state.mean(dim=1) if self.add_pooling_layer else None,
            attentions=tuple(attentions) if output_attentions else None,
            hidden_states=states.select(states.tokens),
            reshaped_hidden_states=states.select(states.maps),
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
        if torch.compiler.is_dynamo_compiling() and not is_exporting():
            # A range makes a symbolic side a number: one graph for each image size, in seconds, and any batch. With
            # symbols, the rounding up to patches, windows and pairs costs torch minutes, size after size.
            for side in pixel_values.shape[2:]:
                range(side)
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.weight.dtype)
        x: Tensor = self.embeddings(pixel_values, bool_masked_pos)  # B, H, W, C
        return x


class SwinHFForImageClassification(SwinHFPreTrainedModel):
    """Swin Transformer with a linear classifier on the mean of the last stage's tokens.

    Args:
        config: Configuration; ``num_labels`` sizes the classifier, 0 leaves it out.
    """

    def __init__(self, config: SwinHFConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.swin = SwinHFModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, head_rows: Sequence[int] | None = None, **kwargs: Any) -> Any:
        """Load as all models of the family do; ``head_rows`` then picks classes, see :meth:`select_labels`."""
        if head_rows is None:
            return super().from_pretrained(*args, **kwargs)
        kwargs.pop("num_labels", None)  # as many as there are rows
        stored, config = cls._stored_config(args[0], kwargs) if args else None, kwargs.get("config")
        if stored is not None and isinstance(config, SwinHFConfig):
            kwargs["config"] = config = copy.deepcopy(config)
            config.id2label, config.label2id = stored.id2label, stored.label2id
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.select_labels(head_rows)
        return loaded

    @torch.no_grad()
    def select_labels(self, rows: Sequence[int]) -> "SwinHFForImageClassification":
        """Keep some classes of a live model, in the order given: the 1k of ImageNet out of 22k, for one.

        Args:
            rows: Numbers of the classes to keep; names in ``config.id2label`` go with them.

        Returns:
            The model itself.

        Raises:
            ValueError: If a number is not a class of the model, or there is none.
        """
        classes: Any = self.config.id2label
        wrong = [row for row in rows if not 0 <= row < len(classes)]
        if wrong or not len(rows):
            raise ValueError(
                f"rows {wrong[:5] if wrong else list(rows)} are no classes of the model; give numbers from 0 to "
                f"{len(classes) - 1}"
            )
        head: Any = self.classifier
        index = torch.as_tensor(list(rows), device=head.weight.device)
        head.weight, head.bias = _like(head.weight, head.weight[index]), _like(head.bias, head.bias[index])
        names = [classes[row] for row in rows]
        self.num_labels = head.out_features = self.config.num_labels = len(rows)
        if len(set(names)) == len(names):
            self.config.id2label = dict(enumerate(names))
            self.config.label2id = {name: number for number, name in enumerate(names)}
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
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
    """

    def __init__(self, config: SwinHFConfig) -> None:
        super().__init__(config)
        self.swin = SwinHFModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    def _resize_decoder(self, channels: int, stride: int) -> None:
        """Adapt the decoder, whose rows are the pixels of ``stride x stride`` squares, channel by channel."""
        decoder: Any = self.decoder
        convolution, shuffle = decoder
        side = shuffle.upscale_factor
        rows = torch.cat([convolution.weight.flatten(1), convolution.bias[:, None]], dim=1).float()
        pixels = rows.T.unflatten(1, (-1, side, side))  # C + 1, channels, stride, stride
        mix = channel_matrix(pixels.shape[1], channels).to(pixels)
        pixels = torch.einsum("ckhw,nk->cnhw", pixels, mix / mix.sum(dim=1, keepdim=True))
        if stride != side:
            pixels = F.interpolate(pixels, size=(stride, stride), mode="bicubic", align_corners=False)
        rows = pixels.flatten(1).T.to(convolution.weight.dtype)
        convolution.weight = _like(convolution.weight, rows[:, :-1, None, None])
        convolution.bias = _like(convolution.bias, rows[:, -1])
        convolution.out_channels = channels * stride**2
        shuffle.upscale_factor = stride

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

        Args:
            pixel_values: Images, ``(B, channels, height, width)``, any rectangle.
            bool_masked_pos: True or 1 where a patch is masked, ``(B, L)`` or ``(B, H, W)`` of the patch grid; the
                loss is the mean L1 distance over the pixels of these patches.
            output_attentions: See :class:`SwinHFModel`.
            output_hidden_states: See :class:`SwinHFModel`.
            kwargs: Other keywords of transformers, of no effect here.

        Raises:
            ValueError: If the mask does not fit the images, or ``encoder_stride`` the patches; else see
                :class:`SwinHFModel`.
        """
        outputs = self.swin(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        assert pixel_values is not None  # the model above has refused None
        batch, _, height, width = pixel_values.shape
        merging, patch = 2 ** (self.config.num_layers - 1), self.config.patch_hw
        grid = (-(-height // patch[0]), -(-width // patch[1]))
        x = outputs.last_hidden_state.transpose(1, 2).unflatten(2, tuple(-(-side // merging) for side in grid))
        reconstruction = self.decoder(x)[..., :height, :width]  # B, channels, height, width

        loss = None
        if bool_masked_pos is not None:
            _check_stride(self.config)
            mask = _as_grid(bool_masked_pos, (batch, *grid))
            mask = mask.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[:, None, :height, :width]
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

    def _is_left_out(self, key: str) -> bool:
        return bool(re.search(r"(^|swin\.)norm\.(weight|bias)$", key))  # each map has a norm of its own

    def _freeze_unused(self) -> None:
        """Take what no feature map depends on out of training; DDP would wait for its gradients in vain."""
        last = max(self.stage_names.index(name) for name in self.out_features)
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
        """Compute the requested feature maps.

        Args:
            pixel_values: Images, ``(B, channels, height, width)``.
            output_hidden_states: Whether to return the maps of all stages, before merging and without norm; or their
                numbers, as in :class:`SwinHFModel`.
            output_attentions: Whether to return the attention of the last block of each stage.
            kwargs: Other keywords of transformers, of no effect here.

        Returns:
            ``feature_maps``, one ``(B, C, H, W)`` for each of ``out_features``.
        """
        output_attentions, wanted_states = _requested(self.config, output_attentions, output_hidden_states)
        everything = output_attentions or wanted_states is not False
        states, attentions, feature_maps = _States(wanted_states), [], {}
        x = states.record(self.swin.embed(pixel_values))  # B, H, W, C
        for number, name in enumerate(self.stage_names):
            if number > 0:
                x = x if number == 1 else self.swin.stages[number - 2].downsample(x)  # B, H/2, W/2, 2C
                x, probabilities = self.swin.stages[number - 1](x, output_attentions)  # B, H, W, C
                attentions.append(probabilities)
                x = states.record(x)
            if name in self.out_features:
                feature_maps[name] = _channels_first(self.hidden_states_norms[name](x))  # B, C, H, W
            if len(feature_maps) == len(self.out_features) and not everything:
                break
        return BackboneOutput(
            feature_maps=tuple(feature_maps.values()),  # type: ignore[arg-type]  # annotated there as of one map
            hidden_states=states.select(states.maps),  # type: ignore[arg-type]  # None where a state was not asked for
            attentions=tuple(attentions) if output_attentions else None,
        )


class _States:
    """The hidden states of one call, in the two forms that transformers returns.

    Args:
        wanted: Whether to keep them, or the numbers of those to keep.
    """

    def __init__(self, wanted: bool | tuple[int, ...]) -> None:
        self.wanted = wanted
        self.tokens: list[Tensor] = []  # B, L, C
        self.maps: list[Tensor] = []  # B, C, H, W

    def record(self, x: Tensor) -> Tensor:
        """Keep ``(B, H, W, C)``; what comes back passes through what was kept, so that it has gradients."""
        if self.wanted is False:
            return x
        self.tokens.append(x.flatten(1, 2))
        self.maps.append(_channels_first(self.tokens[-1].unflatten(1, x.shape[1:3])))
        return self.maps[-1].permute(0, 2, 3, 1)

    def select(self, states: list[Tensor]) -> tuple[Tensor | None, ...] | None:
        """Those that are wanted, with None in place of the others; None if no state is."""
        if isinstance(self.wanted, bool):
            return tuple(states) if self.wanted else None
        count = len(states)
        numbers = {number % count for number in self.wanted if -count <= number < count}
        return tuple(state if number in numbers else None for number, state in enumerate(states))


def normalise_locally(pixels: Tensor, side: int) -> Tensor:
    """Normalise each pixel by the mean and the unbiased variance of its neighbourhood (Swin V2's SimMIM targets).

    Args:
        pixels: ``(B, channels, height, width)``.
        side: Side of the neighbourhood in pixels, odd; what lies outside of the image does not count.
    """
    pool: dict[str, Any] = {"kernel_size": side, "stride": 1, "padding": side // 2}
    mean = F.avg_pool2d(pixels, **pool, count_include_pad=False)
    square = F.avg_pool2d(pixels.square(), **pool, count_include_pad=False)
    count = F.avg_pool2d(torch.ones_like(pixels), **pool, count_include_pad=True) * side**2
    variance = (square - mean.square()).clamp(min=0) * (count / (count - 1))
    return (pixels - mean) / (variance + 1e-6).sqrt()


def _requested(
    config: SwinHFConfig, attentions: bool | None, hidden_states: bool | int | Iterable[int] | None
) -> tuple[bool, bool | tuple[int, ...]]:
    """What a call asks for, else the configuration: attentions, and hidden states, all or those with these numbers."""
    attentions = bool(config.output_attentions if attentions is None else attentions)
    hidden_states = config.output_hidden_states if hidden_states is None else hidden_states
    if hidden_states is None or isinstance(hidden_states, bool):
        return attentions, bool(hidden_states)
    return attentions, (hidden_states,) if isinstance(hidden_states, int) else tuple(hidden_states)


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
    return nn.Parameter(value.contiguous(), requires_grad=parameter.requires_grad)


def _changed(config: SwinHFConfig, **changes: Any) -> SwinHFConfig:
    """Copy of a configuration with other sizes, checked; None changes nothing."""
    target = copy.deepcopy(config)
    for name, value in changes.items():
        if value is not None:
            setattr(target, name, value)
    target.check_sizes()
    return target


def _back_to(config: SwinHFConfig, stored: SwinHFConfig) -> tuple[SwinHFConfig, dict[str, Any]]:
    """Give a configuration the sizes that the weights have; what it had instead comes back beside it."""
    config.check_sizes()
    derived = {"image_size": "image_hw", "patch_size": "patch_hw", "window_size": "stage_windows"}
    names = [n for n in _RESIZABLE if getattr(config, derived.get(n, n)) != getattr(stored, derived.get(n, n))]
    differences = {name: getattr(config, name) for name in names}
    config = _changed(config, **{name: getattr(stored, name) for name in names})
    if "patch_size" in names:
        config.encoder_stride = stored.encoder_stride
    return config, differences


def _check_indices(source: Any, subfolder: str | None) -> None:
    """Refuse a folder whose index of shards names a file that is not in it; transformers would follow any path."""
    if source is None or not (folder := Path(source, subfolder or "")).is_dir():
        return
    for index in sorted(folder.glob("*.index*.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # transformers cannot read it either, and says so
        for name in sorted(names, key=str):
            if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name):
                raise ValueError(
                    f"{index.name} points to {name!r}; a shard lies beside its index and has a plain name, anything "
                    "else is refused: download the folder again, or save the model again"
                )


def check_files(files: Sequence[Path], config: SwinHFConfig) -> None:
    """Refuse weights that are not numbers with a fraction, or that are far too few for the configuration.

    Args:
        files: Files of weights; their headers alone are read.
        config: What asks for parameters; the smallest type of a number has one byte.

    Raises:
        ValueError: If a tensor holds integers, or the missing parameters would fill the memory.
    """
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                refuse_types(path.name, {name: file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118
    size = sum(path.stat().st_size for path in files)
    if files and config.parameters > max(size, FREE_PARAMETERS):
        raise ValueError(
            f"config.json asks for {config.parameters:,} parameters, but the weights have {size:,} bytes, less than "
            "one for each; save both again with save_pretrained"
        )


def refuse_types(source: str, types: Mapping[str, str]) -> None:
    """Refuse tensors whose type, in the words of safetensors, has no fractions or needs a scale."""
    for name, kind in types.items():
        if kind not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(
                f"{source} holds {name} as {kind}; weights are floating-point numbers (F64, F32, F16, BF16): save the "
                "model again, not quantised"
            )


def _check_stride(config: SwinHFConfig) -> None:
    stride = tuple(side * 2 ** (config.num_layers - 1) for side in config.patch_hw)
    if stride != (config.encoder_stride, config.encoder_stride):
        raise ValueError(
            f"encoder_stride is {config.encoder_stride} but patches of {config.patch_hw} in {config.num_layers} "
            f"stages shrink an image by {stride}; the decoder needs a square patch and encoder_stride={stride[0]}"
        )


def _listed(keys: set[str]) -> str:
    """The first twenty keys, for a message."""
    if not keys:
        return ""
    shown = ", ".join(sorted(keys)[:20])
    return f" ({shown}{', ...' if len(keys) > 20 else ''})"


__all__ = [
    "SwinHFBackbone",
    "SwinHFForImageClassification",
    "SwinHFForMaskedImageModeling",
    "SwinHFModel",
    "SwinHFPreTrainedModel",
]
