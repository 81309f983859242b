"""Intersection over union (IoU) of the classes of a picture and of a split, and how sure its mean is."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.sampling import derive_seed

RESAMPLES = 1000
LEAST_PICTURES = 10  # the bootstrap of fewer is too narrow


def region_counts(guess: Tensor, truth: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Pixels of each class of one picture, ``(classes, 3)`` int64 on the CPU: in both, in the truth, and in the guess.

    Both are ``(height, width)`` class numbers; pixels of ``ignore_index`` in the truth do not count.
    """
    known = truth != ignore_index
    guess, truth = guess[known], truth[known]
    parts = (truth[guess == truth], truth, guess)
    return torch.stack([part.bincount(minlength=classes) for part in parts], dim=1).cpu()


def union_of(counts: Tensor) -> Tensor:
    """Pixels of each class in the truth, in the guess, or in both, ``(classes,)``; see :func:`region_counts`."""
    return counts[:, 1] + counts[:, 2] - counts[:, 0]


def picture_scores(counts: Tensor, pixels: int, labels: list[str]) -> tuple[Any, ...]:
    """A line of ``predictions.csv``, from the :func:`region_counts` of a picture of so many ``pixels``.

    Returns:
        Accuracy of the pixels; mean IoU of the classes in the truth or the guess; the class with the lowest IoU, and
        its IoU; share of pixels without a class. All but the last are None where no pixel has a class.
    """
    hits, known = counts[:, 0], int(counts[:, 1].sum())
    if not known:
        return None, None, None, None, 1.0
    present = union_of(counts).nonzero()[:, 0]
    iou = hits[present] / union_of(counts)[present]
    worst = int(iou.argmin())
    accuracy, mean = float(hits.sum() / known), float(iou.mean())
    return accuracy, mean, labels[int(present[worst])], float(iou[worst]), 1 - known / pixels


class PictureBootstrap:
    """How far the mean IoU would be off with other pictures: the Poisson bootstrap over pictures.

    In each of 1000 resamples, a picture occurs as often as its own draw from a Poisson distribution of mean 1 says: the
    classical bootstrap, for pictures that come one by one. The draws of a picture depend on its place in the data
    alone, and what is kept are sums of whole numbers, so that any number of processes finds the same interval. It takes
    16 kB of memory a class, however many pictures there are.
    """

    def __init__(self, classes: int) -> None:
        self.totals = torch.zeros(RESAMPLES, classes, 2, dtype=torch.int64)
        self.pictures = torch.zeros(1, dtype=torch.int64)

    def add(self, counts: Tensor, *place: int) -> None:
        """Add the :func:`region_counts` of a picture at its place in the data."""
        draws = np.random.default_rng(derive_seed("bootstrap", *place)).poisson(1, RESAMPLES)
        union = union_of(counts)
        present = union.nonzero()[:, 0]
        pair = torch.stack([counts[present, 0], union[present]], dim=1)  # present, 2
        self.totals[:, present] += torch.from_numpy(draws)[:, None, None] * pair
        self.pictures += 1

    def interval(self) -> tuple[float, float] | None:
        """The 2.5 and 97.5 percentiles of the mean IoU of the resamples; None for fewer than 10 pictures."""
        hits, union = self.totals.double().unbind(-1)  # RESAMPLES, classes
        known = (union > 0).any(1)
        if int(self.pictures) < LEAST_PICTURES or not known.any():
            return None
        means = (hits / union)[known].nanmean(1)  # 0 / 0, of a class that a resample lacks, is NaN
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high


def class_iou(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Intersection over union of each class from its counts (rows are the truth); NaN for one that occurs nowhere."""
    hits, union = np.diag(counts), counts.sum(axis=0) + counts.sum(axis=1) - np.diag(counts)
    return np.divide(hits, union, out=np.full(len(counts), np.nan), where=union > 0)
