"""Training on Lightning and ``datasets``: exact, complete, restartable."""

from .callbacks import EMA, BestCheckpoint, EpochReport, LastCheckpoint, NonFiniteGuard, RunRecord
from .classifier import SwinClassifier
from .command import run_recipe
from .data import ImageDataModule

__all__ = [
    "EMA",
    "BestCheckpoint",
    "EpochReport",
    "ImageDataModule",
    "LastCheckpoint",
    "NonFiniteGuard",
    "RunRecord",
    "SwinClassifier",
    "run_recipe",
]
