"""The tasks that can be trained, one file each: module, metrics, figures and facts."""

from ..module import SwinModule
from .classification import Freezing, Lora, Mixing, SwinClassifier
from .distillation import Distillation
from .masked_image_modeling import Masking, SwinMaskedImageModeler
from .segmentation import Head, SwinSegmenter

# By the name in swin_hf.families.TASKS.
MODULES: dict[str, type[SwinModule]] = {
    module.task: module for module in (SwinClassifier, SwinMaskedImageModeler, SwinSegmenter)
}

__all__ = [
    "MODULES",
    "Distillation",
    "Freezing",
    "Head",
    "Lora",
    "Masking",
    "Mixing",
    "SwinClassifier",
    "SwinMaskedImageModeler",
    "SwinSegmenter",
]
