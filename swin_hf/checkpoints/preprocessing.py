"""The evaluation transform that belongs to the weights: a wrong one costs more accuracy than most mistakes."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swin_hf.checkpoints.read import PREPROCESSOR_NAME
from swin_hf.model.configuration_swin_hf import SwinHFConfig

if TYPE_CHECKING:
    from swin_hf.checkpoints.load import Checkpoint

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
BICUBIC = 3  # PIL's number

# Short sides that torchvision found best for its own trainings at 224 (Swin_T_Weights, Swin_S_Weights, Swin_B_Weights).
_TORCHVISION_SHORT_SIDES = {(96, 6): 232, (96, 18): 246, (128, 18): 238}  # by embed_dim and depth of the third stage

# From this side on Microsoft squashes the image instead of cropping it (TEST.CROP of its configs).
_SQUASHED_FROM = 384


def evaluation_transform(checkpoint: "Checkpoint", config: SwinHFConfig) -> dict[str, Any] | None:
    """Values for ``preprocessor_config.json``.

    What lies beside the weights is kept as long as the image size is; otherwise Microsoft's evaluation is described,
    which the weights of all layouts but torchvision's were measured with: short side 256/224 of the image, bicubic,
    and a centre crop; from 384 on the image is squashed.

    Args:
        checkpoint: The opened source.
        config: Configuration of what is written.

    Returns:
        The values, or None where the normalisation cannot be known (other than three channels).
    """
    same_size = checkpoint.config.image_hw == config.image_hw
    if checkpoint.source.preprocessor and same_size:
        return dict(checkpoint.source.preprocessor)
    pretrained = checkpoint.source.beside.get("pretrained_cfg")
    if isinstance(pretrained, Mapping) and pretrained.get("mean") and same_size:
        return _like_timm(pretrained, config)
    if config.num_channels != 3:
        return None
    height, width = config.image_hw
    if min(height, width) >= _SQUASHED_FROM:
        return squash(height, width, IMAGENET_MEAN, IMAGENET_STD)
    short = int(256 / 224 * min(height, width))
    is_torchvision = checkpoint.place.layout.name == "torchvision" and config.num_labels == 1000
    if is_torchvision and (height, width) == (224, 224) and config.num_layers > 2:
        short = _TORCHVISION_SHORT_SIDES.get((config.embed_dim, config.depths[2]), short)
    return crop(short, height, width, IMAGENET_MEAN, IMAGENET_STD)


def _like_timm(pretrained: Mapping[str, Any], config: SwinHFConfig) -> dict[str, Any]:
    height, width = config.image_hw
    mean, std = list(pretrained["mean"]), list(pretrained.get("std") or IMAGENET_STD)
    share = float(pretrained.get("crop_pct") or 0.875)
    if pretrained.get("crop_mode") == "squash":
        return squash(height, width, mean, std)
    return crop(int(min(height, width) / share), height, width, mean, std)


def image_processor(transform: Mapping[str, Any]) -> Any:
    """The image processor of transformers that some values of ``preprocessor_config.json`` describe."""
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PREPROCESSOR_NAME).write_text(json.dumps(dict(transform)), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder)


def crop(short: int, height: int, width: int, mean: list[float], std: list[float]) -> dict[str, Any]:
    """Resize the short side to ``short`` pixels, then cut ``height`` by ``width`` out of the centre.

    ViTImageProcessor, which Swin has in transformers, cannot crop; BitImageProcessor is the plain processor that can.
    """
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": short},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        **_rest(mean, std),
    }


def squash(height: int, width: int, mean: list[float], std: list[float]) -> dict[str, Any]:
    """Resize to ``height`` by ``width``, whatever the proportions were."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BICUBIC,
        **_rest(mean, std),
    }


def _rest(mean: list[float], std: list[float]) -> dict[str, Any]:
    return {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_convert_rgb": True,
    }
