"""Training on Lightning and ``datasets``: exact, complete, restartable."""

from .api import Run, train
from .callbacks import EpochReport
from .checkpointing import EMA, BestCheckpoint, LastCheckpoint, NonFiniteGuard
from .command import run_recipe
from .data.module import ImageDataModule
from .data.reading import Reading
from .data.segmentation import JointAugmentation, Masks, SegmentationDataModule
from .data.splits import Splits
from .data.targets import MultiLabelDataModule, RegressionDataModule
from .data.transforms import Augmentation, Pixels
from .loggers import TrackioLogger
from .module import SwinModule, TestReport
from .network import Network
from .optim import Optimization
from .record import RunRecord
from .tasks import MODULES
from .tasks.classification import SwinClassifier
from .tasks.distillation import Distillation
from .tasks.heads import Freezing, Lora, Mixing
from .tasks.masked_image_modeling import Masking, SwinMaskedImageModeler
from .tasks.multi_label import SwinMultiLabelClassifier
from .tasks.regression import SwinRegressor
from .tasks.segmentation import Head, SwinSegmenter

__all__ = [
    "EMA",
    "MODULES",
    "Augmentation",
    "BestCheckpoint",
    "Distillation",
    "EpochReport",
    "Freezing",
    "Head",
    "ImageDataModule",
    "JointAugmentation",
    "LastCheckpoint",
    "Lora",
    "Masking",
    "Masks",
    "Mixing",
    "MultiLabelDataModule",
    "Network",
    "NonFiniteGuard",
    "Optimization",
    "Pixels",
    "Reading",
    "RegressionDataModule",
    "Run",
    "RunRecord",
    "SegmentationDataModule",
    "Splits",
    "SwinClassifier",
    "SwinMaskedImageModeler",
    "SwinModule",
    "SwinMultiLabelClassifier",
    "SwinRegressor",
    "SwinSegmenter",
    "TestReport",
    "TrackioLogger",
    "run_recipe",
    "train",
]
