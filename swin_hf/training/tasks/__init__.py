"""The tasks that can be trained, one file each: module, metrics, figures and facts."""

from ..module import SwinModule
from .classification import SwinClassifier
from .masked_image_modeling import SwinMaskedImageModeler
from .multi_label import SwinMultiLabelClassifier
from .regression import SwinRegressor
from .segmentation import SwinSegmenter

# By the name in swin_hf.families.TASKS, and what else a model for image classification is trained for.
MODULES: dict[str, type[SwinModule]] = {
    **{module.task: module for module in (SwinClassifier, SwinMaskedImageModeler, SwinSegmenter)},
    "multi-label-classification": SwinMultiLabelClassifier,
    "image-regression": SwinRegressor,
}
