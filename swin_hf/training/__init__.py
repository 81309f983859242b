"""Training on Lightning and ``datasets``: exact, complete, restartable."""

from .api import Run, train
from .callbacks import EpochReport
from .checkpointing import EMA, BestCheckpoint, LastCheckpoint, NonFiniteGuard
from .command import run_recipe
from .data import (
    Augmentation,
    ImageDataModule,
    JointAugmentation,
    Masks,
    MultiLabelDataModule,
    Pixels,
    Reading,
    RegressionDataModule,
    SegmentationDataModule,
    Splits,
)
from .loggers import TrackioLogger
from .module import SwinModule, TestReport
from .network import Network
from .optim import Optimization
from .record import RunRecord
from .tasks import (
    MODULES,
    Distillation,
    Freezing,
    Head,
    Lora,
    Masking,
    Mixing,
    SwinClassifier,
    SwinMaskedImageModeler,
    SwinMultiLabelClassifier,
    SwinRegressor,
    SwinSegmenter,
)

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
