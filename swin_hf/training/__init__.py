"""Training on Lightning and ``datasets``: exact, complete, restartable."""

from .callbacks import EMA, BestCheckpoint, EpochReport, LastCheckpoint, NonFiniteGuard, RunRecord
from .classifier import SwinClassifier
from .command import run_recipe
from .data import ImageDataModule
from .loggers import TrackioLogger
from .pretraining import SwinMaskedImageModeler

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
