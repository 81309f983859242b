"""Pictures with several labels each, or with numbers: where these are found, and what a row of them means."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from datasets import ClassLabel, Features, LargeList, List
from lightning.pytorch.utilities import rank_zero_info

from swin_hf.text import one_line

from .module import ImageDataModule
from .reading import Reading, flat
from .sampling import Integers
from .shards import cells_of, shorten
from .sources import (
    LABEL_NAMES,
    UNLABELLED,
    Source,
    Targets,
    find_column,
    is_fraction,
    is_integer,
    is_label,
    is_text,
    kind,
    remedy,
)

LIST_NAMES = (*LABEL_NAMES, "classes", "tags")
NUMBER_NAMES = (*LABEL_NAMES, "value", "score", "y")
FLAGS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0, str(UNLABELLED): np.nan}


@dataclass
class RowSource(Source):
    """A source whose target is a row of numbers; all are NaN where a picture has no label."""

    columns: list[str] = field(default_factory=list)  # with a number each; empty where one column has lists
    places: list[int] = field(default_factory=list)  # in the row, of the number of each column

    @property
    def label_columns(self) -> list[str]:
        """The columns that the target of a row is made of."""
        return self.columns or super().label_columns

    def use_columns(self, columns: list[str]) -> None:
        """Take a column for each number of a row; ValueError if one does not exist, or is named twice."""
        for column in columns:
            find_column(self.features, "", "label_column", column)
        if len(set(columns)) < len(columns) or not columns:
            raise ValueError(f"label_column {columns} names a column twice, or none; name each column once")
        self.columns, self.class_names = columns, list(columns)
        self.label_column, self.places = columns[0], list(range(len(columns)))

    def target(self, cells: Mapping[str, Any]) -> Targets:
        """What is learned of a row, ``float32``."""
        row = np.zeros(len(self.class_names), dtype=np.float32)
        row[self.places] = [self.number(cells[column], column) for column in self.columns]
        return np.full_like(row, np.nan) if np.isnan(row).any() else row

    def number(self, cell: Any, column: str) -> float:
        """The number of a cell, NaN where it is empty; ValueError if it is not a number."""
        raise NotImplementedError

    def labels(self, split: str) -> Targets:
        """The target of every row of a map-style split."""
        rows = zip(*(cells_of(self.splits[split], column) for column in self.label_columns), strict=True)
        return np.stack([self.target(dict(zip(self.label_columns, row, strict=True))) for row in rows])

    def labelled(self, labels: Targets) -> Targets:
        """Which of the rows have a label, booleans."""
        return np.logical_not(np.isnan(labels).any(axis=1))

    def renumber(self, order: Sequence[int], names: Sequence[str]) -> None:
        """Order the numbers of a row as a model does."""
        self.places = [order[place] for place in self.places]
        super().renumber(order, names)

    def reorder(self, labels: Targets, order: Sequence[int]) -> Targets:
        """Labelled rows in the order that :meth:`renumber` has been told."""
        rows = np.zeros((len(labels), len(self.class_names)), dtype=labels.dtype)
        rows[:, list(order)] = labels
        return rows


class MultiLabelSource(RowSource):
    """Any number of classes for each picture: a list of them in one column, or a column of 0 and 1 for each class."""

    def find_labels(self, reading: Reading, dataset: str) -> None:
        """Find the columns of the labels and the classes; ValueError if there are none, or they are of another kind."""
        features = self.features
        if isinstance(reading.label_column, list):
            self.use_columns(reading.label_column)
            for column in self.columns:
                feature = features[column]
                is_pair = isinstance(feature, ClassLabel) and len(feature.names) == 2
                if not (is_label(feature) or is_fraction(feature) or is_pair):
                    rule = f"a column of a class holds 0 or 1, or true or false; {remedy(feature, column)}"
                    raise ValueError(f"label column {column!r} is of type {kind(feature)}; {rule}")
            return
        column = _find(features, reading.label_column, "a list of labels", LIST_NAMES, _is_list)
        feature = features[column]
        if not _is_list(feature):
            raise ValueError(
                f"label column {column!r} is of type {kind(feature)}; several labels of a picture are a list of"
                " ClassLabel, text or integers in one column, or a column of 0 and 1 for each class, all named in"
                f" label_column; {_other_kind(feature, column)}"
            )
        for name, split in self.splits.items():
            if column in split.features and split.features[column] != feature:
                others = f"{name!r} declares other labels than that of {self.reference!r}"
                raise ValueError(f"column {column!r} of split {others}; declare the same in both")
        self.label_column = column
        self.name_classes(feature.feature, reading)

    def values(self) -> Iterable[Any]:
        """The stored labels of the reference split."""
        return chain.from_iterable(cell for cell in super().values() if cell is not None)

    def target(self, cells: Mapping[str, Any]) -> Targets:
        """1 for each class that a picture has, else 0; ``(classes,)``."""
        if self.columns:
            return super().target(cells)
        cell, classes = cells[str(self.label_column)], len(self.class_names)
        if cell is None:
            return np.full(classes, np.nan, dtype=np.float32)
        numbers = [self.class_id(label) for label in cell]
        if not all(0 <= number < classes for number in numbers):
            problem = f"holds {cell}, and there are {classes} classes, {shorten(self.class_names)}"
            raise ValueError(f"column {self.label_column!r} {problem}; correct it, or name all in class_names")
        row = np.zeros(classes, dtype=np.float32)
        row[numbers] = 1
        return row

    def number(self, cell: Any, column: str) -> float:
        """0 or 1."""
        text = "" if cell is None else str(cell).strip().lower()
        if text and text not in FLAGS:
            rule = "a column of a class holds 0 or 1, true or false, or nothing where that is unknown"
            raise ValueError(f"column {column!r} holds {cell!r}; {rule}")
        return FLAGS.get(text, np.nan)

    def strata(self, labels: Targets) -> Integers:
        """The rarest class of each row, so that each split gets some of it."""
        order = labels.sum(axis=0).argsort(kind="stable")
        return np.asarray(np.where(labels.any(axis=1), labels[:, order].argmax(axis=1), labels.shape[1]))

    def counts(self, labels: Targets) -> Integers:
        """Number of rows that have each class."""
        return np.asarray(np.nansum(labels, axis=0), dtype=np.int64)

    def check_training(self, labels: Targets) -> None:
        """Refuse training rows that all have the same classes: they teach nothing."""
        if np.all(labels == labels[0]):
            raise ValueError(f"all training pictures have the same labels, in {shorten(self.label_columns)}")


class NumberSource(RowSource):
    """One number for each picture, or several."""

    def find_labels(self, reading: Reading, dataset: str) -> None:
        """Find the columns of the numbers; ValueError if there are none, or they are of another kind."""
        wanted = reading.label_column
        one = [] if wanted else [_find(self.features, None, "a number", NUMBER_NAMES, is_fraction)]
        self.use_columns(flat(wanted) or one)
        for column in self.columns:
            feature = self.features[column]
            if not (is_fraction(feature) or is_integer(feature) or is_text(feature)):
                rule = f"a regression learns whole numbers and fractions; {_other_kind(feature, column)}"
                raise ValueError(f"label column {column!r} is of type {kind(feature)}; {rule}")

    def number(self, cell: Any, column: str) -> float:
        """The number of a cell, NaN where it is empty."""
        text = "" if cell is None else str(cell).strip()
        try:
            number = float(text or "nan")
        except ValueError:
            number = np.inf
        if np.isinf(number):
            raise ValueError(f"column {column!r} holds {cell!r}; a regression learns finite numbers: correct it")
        return number

    def strata(self, labels: Targets) -> Integers:
        """All rows are alike."""
        return np.zeros(len(labels), dtype=np.int64)

    def reorder(self, labels: Targets, order: Sequence[int]) -> Targets:
        """Labelled rows in the order that :meth:`renumber` has been told; ValueError if the model knows more."""
        if len(order) < len(self.class_names):
            raise ValueError(
                f"the model predicts {shorten(self.class_names)}, and the data have {len(order)} of these numbers; name"
                " the columns of all of them with label_column"
            )
        return super().reorder(labels, order)

    def check_training(self, labels: Targets) -> None:
        """Refuse a number that is the same in all training rows: it teaches nothing."""
        same = [name for name, column in zip(self.class_names, labels.T, strict=True) if np.all(column == column[0])]
        if same:
            raise ValueError(f"column {same[0]!r} has the same number for all training pictures; name another one")


def _find(features: Features, wanted: str | None, what: str, names: Sequence[str], fits: Callable[..., bool]) -> str:
    """The column of labels of a kind, else one with a usual name, which says so by its type."""
    several = ", or several: label_column [a, b]"
    kinds = (lambda _, feature: fits(feature), lambda name, _: name in names)
    return find_column(features, f"column with {what}", "label_column", wanted, *kinds, usual=names, more=several)


def _is_list(feature: Any) -> bool:
    inner = getattr(feature, "feature", None) if isinstance(feature, List | LargeList) else None
    return is_label(inner) or isinstance(inner, ClassLabel)


def _other_kind(feature: Any, column: str) -> str:
    if isinstance(feature, ClassLabel) or is_label(feature):
        return "one class for each picture is learned with --task image-classification"
    return remedy(feature, column)


class MultiLabelDataModule(ImageDataModule):
    """Batches of pictures with several labels each; ``labels`` are ``(B, classes)`` of 0 and 1, ``float32``.

    The labels are a list of ClassLabel, text or integers in one column, or a column of 0 and 1 for each class, all
    named in ``reading.label_column``. What is held out is stratified by the rarest class of each picture. Options are
    those of :class:`ImageDataModule`.
    """

    source_class = MultiLabelSource


class RegressionDataModule(ImageDataModule):
    """Batches of pictures with numbers; ``labels`` are ``(B, numbers)`` of ``float32``, as they are stored.

    The names of the numbers are those of their columns. Options are those of :class:`ImageDataModule`.
    """

    source_class = NumberSource

    @property
    def class_counts(self) -> dict[str, int]:
        """Empty: there are no classes."""
        return {}

    @property
    def label_means(self) -> list[float]:
        """Mean of each number of the training split; empty for a stream and without one."""
        self.load()
        return [float(mean) for mean in self._labels["train"].mean(axis=0)] if "train" in self._labels else []

    def announce(self) -> None:
        """Say which numbers are learned, and in which range they are."""
        if self.reading.streaming:
            return
        sizes = ", ".join(f"{name} {size:,}" for name, size in self.split_sizes.items())
        lines = [f"pictures with all numbers: {sizes}"]
        for name, values in zip(self.load().class_names, self._labels["train"].T, strict=True):
            spread = f"{values.mean():.6g} +- {values.std():.6g}"
            lines.append(f"{one_line(name)}: {values.min():.6g} to {values.max():.6g}, mean {spread}")
        rank_zero_info("\n".join(lines))
