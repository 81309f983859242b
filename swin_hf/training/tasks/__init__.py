"""The tasks that can be trained, one file each: module, metrics, figures and facts."""

from ..module import SwinModule
from .classification import SwinClassifier
from .distillation import Distillation
from .heads import Freezing, Lora, Mixing
from .masked_image_modeling import Masking, SwinMaskedImageModeler
from .multi_label import SwinMultiLabelClassifier
from .regression import SwinRegressor
from .segmentation import Head, SwinSegmenter

# By the name in swin_hf.families.TASKS, and what else a model for image classification is trained for.
MODULES: dict[str, type[SwinModule]] = {
    **{module.task: module for module in (SwinClassifier, SwinMaskedImageModeler, SwinSegmenter)},
    "multi-label-classification": SwinMultiLabelClassifier,
    "image-regression": SwinRegressor,
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
    "SwinMultiLabelClassifier",
    "SwinRegressor",
    "SwinSegmenter",
]
