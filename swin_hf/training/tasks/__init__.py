"""The tasks that can be trained, one file each: module, metrics, figures and facts."""

from ..module import SwinModule
from .classification import Freezing, Lora, Mixing, SwinClassifier
from .distillation import Distillation
from .masked_image_modeling import Masking, SwinMaskedImageModeler

# By the name in swin_hf.families.TASKS.
MODULES: dict[str, type[SwinModule]] = {module.task: module for module in (SwinClassifier, SwinMaskedImageModeler)}

__all__ = [
    "MODULES",
    "Distillation",
    "Freezing",
    "Lora",
    "Masking",
    "Mixing",
    "SwinClassifier",
    "SwinMaskedImageModeler",
]
