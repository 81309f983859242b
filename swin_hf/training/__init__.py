"""Training on Lightning and ``datasets``: exact, complete, restartable."""

from .api import Run, train
from .callbacks import EpochReport
from .checkpointing import EMA, BestCheckpoint, LastCheckpoint, NonFiniteGuard
from .command import run_recipe
from .data import Augmentation, ImageDataModule, Pixels, Reading, Splits
from .loggers import TrackioLogger
from .module import SwinModule, TestReport
from .network import Network
from .optim import Optimization
from .record import RunRecord
from .tasks import (
    MODULES,
    Distillation,
    Freezing,
    Lora,
    Masking,
    Mixing,
    SwinClassifier,
    SwinMaskedImageModeler,
)

__all__ = [
    "EMA",
    "MODULES",
    "Augmentation",
    "BestCheckpoint",
    "Distillation",
    "EpochReport",
    "Freezing",
    "ImageDataModule",
    "LastCheckpoint",
    "Lora",
    "Masking",
    "Mixing",
    "Network",
    "NonFiniteGuard",
    "Optimization",
    "Pixels",
    "Reading",
    "Run",
    "RunRecord",
    "Splits",
    "SwinClassifier",
    "SwinMaskedImageModeler",
    "SwinModule",
    "TestReport",
    "TrackioLogger",
    "run_recipe",
    "train",
]
