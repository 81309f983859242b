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
    Pixels,
    Reading,
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
    "Network",
    "NonFiniteGuard",
    "Optimization",
    "Pixels",
    "Reading",
    "Run",
    "RunRecord",
    "SegmentationDataModule",
    "Splits",
    "SwinClassifier",
    "SwinMaskedImageModeler",
    "SwinModule",
    "SwinSegmenter",
    "TestReport",
    "TrackioLogger",
    "run_recipe",
    "train",
]
