"""From any image dataset to batches."""

from .module import ImageDataModule
from .reading import Reading
from .splits import Splits
from .transforms import Augmentation, Pixels

__all__ = ["Augmentation", "ImageDataModule", "Pixels", "Reading", "Splits"]
