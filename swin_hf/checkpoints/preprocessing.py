"""The preprocessing that belongs to foreign weights: a wrong one costs more accuracy than most mistakes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.pixels import IMAGENET_STD
from swin_hf.processing import RESAMPLING, Preprocessing, short_side

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from swin_hf.checkpoints.load import Checkpoint

# Short sides that torchvision found best for its own trainings at 224 (Swin_T_Weights, Swin_S_Weights, Swin_B_Weights).
_TORCHVISION_SHORT_SIDES = {(96, 6): 232, (96, 18): 246, (128, 18): 238}  # by embed_dim and depth of the third stage


def processor_values(checkpoint: "Checkpoint", config: SwinHFConfig) -> dict[str, Any] | None:
    """How the pictures of a checkpoint were prepared, as ``preprocessor_config.json``, for a model of this size.

    The processor in the folder of the weights is kept as long as the image size is, its values as they are where a
    :class:`Preprocessing` cannot hold them. Otherwise it is Microsoft's evaluation, which the weights of all layouts
    but torchvision's were measured with; None where the normalisation is not known (other than three channels).
    """
    same_size = checkpoint.config.image_hw == config.image_hw
    values = checkpoint.source.preprocessor
    if values and same_size:
        known = Preprocessing.from_values(values)
        return known.values() if known else dict(values)
    timm = checkpoint.source.config_json.get("pretrained_cfg")
    if isinstance(timm, Mapping) and timm.get("mean") and same_size:
        name, share = timm.get("interpolation"), float(timm.get("crop_pct") or 0.875)
        return Preprocessing(
            config.image_hw,
            None if timm.get("crop_mode") == "squash" else short_side(config.image_hw, share),
            tuple(timm["mean"]),
            tuple(timm.get("std") or IMAGENET_STD),
            name if name in RESAMPLING else "bicubic",
        ).values()
    if config.num_channels != 3:
        return None
    preprocessing = Preprocessing.of_release(config.image_hw)
    is_torchvision = checkpoint.place.layout.name == "torchvision" and config.num_labels == 1000
    if is_torchvision and config.image_hw == (224, 224) and config.num_layers > 2:
        short = _TORCHVISION_SHORT_SIDES.get((config.embed_dim, config.depths[2]), preprocessing.short_side)
        preprocessing = Preprocessing(config.image_hw, short)
    return preprocessing.values()


def image_processor(values: Mapping[str, Any]) -> "BaseImageProcessor":
    """The image processor of ``preprocessor_config.json``, ours if it does no more; ValueError for an unknown class."""
    if preprocessing := Preprocessing.from_values(values):
        return preprocessing.processor()
    values = dict(values)
    name = values.pop("image_processor_type", "ViTImageProcessor")
    if (kind := class_of_processor(name)) is None:
        raise ValueError(
            f"preprocessor_config.json names the image processor {name!r}, which transformers does not have; save one "
            "of transformers with the weights, or remove the file"
        )
    return kind(**values)


def class_of_processor(name: Any) -> "type[BaseImageProcessor] | None":
    """The image processor of transformers of a name, or its successor where it is an old name."""
    import transformers

    kind = getattr(transformers, str(name).replace("FeatureExtractor", "ImageProcessor"), None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.BaseImageProcessor) else None
