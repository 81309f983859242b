"""From any image dataset to batches."""

from .module import ImageDataModule
from .prepare import Prepared, Shrinking, prepare
from .reading import Reading
from .segmentation import JointAugmentation, Masks, SegmentationDataModule
from .splits import Splits
from .targets import MultiLabelDataModule, RegressionDataModule
from .transforms import Augmentation, Pixels

__all__ = [
    "Augmentation",
    "ImageDataModule",
    "JointAugmentation",
    "Masks",
    "MultiLabelDataModule",
    "Pixels",
    "Prepared",
    "Reading",
    "RegressionDataModule",
    "SegmentationDataModule",
    "Shrinking",
    "Splits",
    "prepare",
]
