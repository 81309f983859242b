"""Training on Lightning and ``datasets``: exact, complete, restartable."""

from .callbacks import EpochReport
from .checkpointing import EMA, BestCheckpoint, LastCheckpoint, NonFiniteGuard
from .classifier import SwinClassifier
from .command import run_recipe
from .data import ImageDataModule
from .loggers import TrackioLogger
from .pretraining import SwinMaskedImageModeler
from .record import RunRecord

__all__ = [
    "EMA",
    "BestCheckpoint",
    "EpochReport",
    "ImageDataModule",
    "LastCheckpoint",
    "NonFiniteGuard",
    "RunRecord",
    "SwinClassifier",
    "SwinMaskedImageModeler",
    "TrackioLogger",
    "run_recipe",
]
