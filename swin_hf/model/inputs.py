"""Checks of a model's inputs: images, and the masks and targets of masked image modeling.

Shape legend:
    B batch, H and W height and width of the patch grid, L = H * W.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_swin_hf import SwinHFConfig


def check_images(pixel_values: Tensor | None, config: SwinHFConfig) -> Tensor:
    """Return images ``(B, channels, height, width)`` as they are; ValueError if they are not such, or not floats."""
    if pixel_values is None:
        raise ValueError("pixel_values is missing; give images of shape (batch, channels, height, width)")
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; give (batch, channels, height, width), "
            "for a single image image.unsqueeze(0)"
        )
    if pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"pixel_values has {pixel_values.shape[1]} channels but the model takes num_channels "
            f"{config.num_channels}; convert the images, or load the model with num_channels={pixel_values.shape[1]}"
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}, which are pixels as they are stored, and the model takes "
            "floating-point values; normalise them with the image processor of the model"
        )
    if torch.compiler.is_dynamo_compiling():
        # range() specialises the graph on height and width (the batch stays dynamic). With dynamic sides, the
        # divisions with rounding up that follow from them take minutes to trace.
        for side in pixel_values.shape[2:]:
            range(side)
    return pixel_values


def pad_to_patches(pixel_values: Tensor, patch: Sequence[int]) -> Tensor:
    """Append rows and columns of zeros to images ``(B, channels, height, width)`` until whole patches fit."""
    (height, width), (rows, columns) = pixel_values.shape[-2:], patch
    bottom, right = -height % rows, -width % columns
    return F.pad(pixel_values, (0, right, 0, bottom)) if bottom or right else pixel_values


def replace_masked(x: Tensor, mask: Tensor, token: Tensor | None) -> Tensor:
    """Put the mask token where a mask, ``(B, L)`` or ``(B, H, W)``, is True in a map ``(B, H, W, C)``."""
    if token is None:
        raise ValueError("bool_masked_pos was given but the model has no mask token; build it with use_mask_token=True")
    mask = as_grid(mask, x.shape[:3]).to(x.dtype).unsqueeze(-1)  # B, H, W, 1
    return x * (1 - mask) + token.to(x.dtype) * mask


def as_grid(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """View a mask, ``(B, L)`` or ``(B, H, W)``, as the ``(B, H, W)`` of the images; ValueError if it does not fit."""
    batch, height, width = grid
    if tuple(mask.shape) not in ((batch, height * width), (batch, height, width)):
        raise ValueError(
            f"bool_masked_pos has shape {tuple(mask.shape)}; the images have a grid of {height}x{width} patches, so "
            f"give ({batch}, {height * width}) or ({batch}, {height}, {width})"
        )
    return mask.reshape(batch, height, width)


def masked_distance(reconstruction: Tensor, pixel_values: Tensor, mask: Tensor, config: SwinHFConfig) -> Tensor:
    """The loss of SimMIM: the mean L1 distance over the pixels of masked patches.

    Images and their reconstruction are ``(B, channels, height, width)``; the mask, ``(B, L)`` or ``(B, H, W)``, is True
    or 1 where a patch is masked. ``config.norm_targets`` normalises the images first.
    """
    (batch, _, height, width), patch = pixel_values.shape, config.patch_hw
    mask = as_grid(mask, (batch, -(-height // patch[0]), -(-width // patch[1])))
    mask = mask.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)[:, None, :height, :width]
    target = pixel_values.to(reconstruction.dtype)
    if config.norm_targets is not None:
        target = normalise_locally(target, config.norm_targets)
    distance = (target - reconstruction).abs() * mask
    return distance.sum() / (mask.sum() + 1e-5) / config.num_channels


def normalise_locally(pixels: Tensor, side: int) -> Tensor:
    """Normalise each pixel by the mean and the unbiased variance of its neighbourhood (Swin V2's SimMIM targets).

    ``pixels`` are ``(B, channels, height, width)``; the neighbourhood has an odd ``side`` in pixels, of which those
    outside of the image do not count.
    """
    pool: dict[str, Any] = {"kernel_size": side, "stride": 1, "padding": side // 2}
    mean = F.avg_pool2d(pixels, **pool, count_include_pad=False)
    square = F.avg_pool2d(pixels.square(), **pool, count_include_pad=False)
    count = F.avg_pool2d(torch.ones_like(pixels), **pool, count_include_pad=True) * side**2
    variance = (square - mean.square()).clamp(min=0) * (count / (count - 1))
    return (pixels - mean) / (variance + 1e-6).sqrt()
