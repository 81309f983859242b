"""Pictures with several labels each, or with numbers: where these are found, and what a row of them means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from datasets import ClassLabel, Features, LargeList, List
from lightning.pytorch.utilities import rank_zero_info

from swin_hf.text import one_line

from .module import ImageDataModule
from .reading import DataFiles, Reading, flat
from .shards import shorten
from .sources import (
    LABEL_NAMES,
    UNLABELLED,
    Integers,
    Source,
    Targets,
    check_columns,
    describe,
    is_fraction,
    is_integer,
    is_label,
    is_text,
    kind,
    name_classes,
    open_source,
    remedy,
    require_column,
)

LIST_NAMES = (*LABEL_NAMES, "classes", "tags")
NUMBER_NAMES = (*LABEL_NAMES, "value", "score", "y")
FLAGS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0, str(UNLABELLED): np.nan}


@dataclass
class RowSource(Source):
    """A source whose target is a row of numbers; all are NaN where a picture has no label.

    Attributes:
        columns: Columns with a number each; empty where one column has lists.
        places: The place in the row of the number of each column.
    """

    columns: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @property
    def label_columns(self) -> list[str]:
        """The columns that the target of a row is made of."""
        return self.columns or super().label_columns

    def target(self, cells: Mapping[str, Any]) -> Targets:
        """What is learned of a row, ``float32``."""
        row = np.zeros(len(self.class_names), dtype=np.float32)
        row[self.places] = [self.number(cells[column], column) for column in self.columns]
        return np.full_like(row, np.nan) if np.isnan(row).any() else row

    def number(self, cell: Any, column: str) -> float:
        """The number of a cell, NaN where it is empty.

        Raises:
            ValueError: If it is not a number.
        """
        raise NotImplementedError

    def labels(self, split: str) -> Targets:
        """The target of every row of a map-style split."""
        cells = self.splits[split].select_columns(self.label_columns)[:]
        rows = zip(*(cells[column] for column in self.label_columns), strict=True)
        return np.stack([self.target(dict(zip(self.label_columns, row, strict=True))) for row in rows])

    def labelled(self, labels: Targets) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of the rows have a label."""
        known: np.ndarray[Any, np.dtype[np.bool_]] = np.logical_not(np.isnan(labels).any(axis=1))
        return known

    def renumber(self, order: Sequence[int], names: Sequence[str]) -> None:
        """Order the numbers of a row as a model does."""
        self.places = [order[place] for place in self.places]
        super().renumber(order, names)

    def reorder(self, labels: Targets, order: Sequence[int]) -> Targets:
        """Labelled rows in the order that :meth:`renumber` has been told."""
        rows = np.zeros((len(labels), len(self.class_names)), dtype=labels.dtype)
        rows[:, list(order)] = labels
        return rows

    def check(self, labels: Targets) -> None:
        """Nothing: :meth:`target` has looked at each cell."""


class MultiLabelSource(RowSource):
    """Any number of classes for each picture: a list of them in one column, or a column of 0 and 1 for each class."""

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
            raise ValueError(
                f"column {self.label_column!r} holds {cell}, and there are {classes} classes,"
                f" {shorten(self.class_names)}; correct it, or name all classes with class_names"
            )
        row = np.zeros(classes, dtype=np.float32)
        row[numbers] = 1
        return row

    def number(self, cell: Any, column: str) -> float:
        """0 or 1."""
        text = "" if cell is None else str(cell).strip().lower()
        if text and text not in FLAGS:
            raise ValueError(
                f"column {column!r} holds {cell!r}; a column of a class holds 0 or 1, true or false, or nothing where"
                " that is unknown"
            )
        return FLAGS.get(text, np.nan)

    def strata(self, labels: Targets) -> Integers:
        """The rarest class of each row, so that each split gets some of it."""
        order = labels.sum(axis=0).argsort(kind="stable")
        numbers: Integers = np.where(labels.any(axis=1), labels[:, order].argmax(axis=1), labels.shape[1])
        return numbers

    def counts(self, labels: Targets) -> Integers:
        """Number of rows that have each class."""
        counted: Integers = np.nansum(labels, axis=0).astype(np.int64)
        return counted

    def check_training(self, labels: Targets) -> None:
        """Refuse training rows that teach nothing.

        Raises:
            ValueError: If all have the same classes.
        """
        if np.all(labels == labels[0]):
            raise ValueError(f"all training pictures have the same labels, in {shorten(self.label_columns)}")


class NumberSource(RowSource):
    """One number for each picture, or several."""

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
        """Labelled rows in the order that :meth:`renumber` has been told.

        Raises:
            ValueError: If the model knows more numbers than the data.
        """
        if len(order) < len(self.class_names):
            raise ValueError(
                f"the model predicts {shorten(self.class_names)}, and the data have {len(order)} of these numbers; name"
                " the columns of all of them with label_column"
            )
        return super().reorder(labels, order)

    def check_training(self, labels: Targets) -> None:
        """Refuse training rows that teach nothing.

        Raises:
            ValueError: If a number is always the same.
        """
        same = [name for name, column in zip(self.class_names, labels.T, strict=True) if np.all(column == column[0])]
        if same:
            raise ValueError(f"column {same[0]!r} has the same number for all training pictures; name another one")


def load_multi_label(
    dataset: str, data_files: DataFiles | None, data_dir: str | None, reading: Reading
) -> MultiLabelSource:
    """Load pictures with several labels each; the arguments are those of
    :func:`swin_hf.training.data.sources.load_source`.

    Raises:
        ValueError: If the labels cannot be found, or are of another kind.
    """
    source = open_source(dataset, data_files, data_dir, reading, MultiLabelSource)
    features = source.splits[source.reference].features
    if isinstance(reading.label_column, list):
        _use_columns(source, features, reading.label_column)
        for column in source.columns:
            if not (is_label(features[column]) or is_fraction(features[column]) or _is_pair(features[column])):
                raise ValueError(
                    f"label column {column!r} is of type {kind(features[column])}; a column of a class holds 0 or 1, or"
                    f" true or false; {remedy(features[column], column)}"
                )
    else:
        column = reading.label_column or _only(features, LIST_NAMES, _is_list, "a list of labels")
        require_column(column, features)
        feature = features[column]
        if not _is_list(feature):
            raise ValueError(
                f"label column {column!r} is of type {kind(feature)}; several labels of a picture are a list of"
                " ClassLabel, text or integers in one column, or a column of 0 and 1 for each class, all named in"
                f" label_column; {_other_kind(feature, column)}"
            )
        for name, split in source.splits.items():
            if column in split.features and split.features[column] != feature:
                raise ValueError(
                    f"column {column!r} of split {name!r} declares other labels than that of {source.reference!r};"
                    " declare the same in both"
                )
        source.label_column = column
        name_classes(source, feature.feature, reading.streaming, reading.class_names)
    check_columns(source)
    return source


def load_numbers(dataset: str, data_files: DataFiles | None, data_dir: str | None, reading: Reading) -> NumberSource:
    """Load pictures with numbers; the arguments are those of :func:`swin_hf.training.data.sources.load_source`.

    Raises:
        ValueError: If the numbers cannot be found.
    """
    source = open_source(dataset, data_files, data_dir, reading, NumberSource)
    features = source.splits[source.reference].features
    columns = flat(reading.label_column) or [_only(features, NUMBER_NAMES, is_fraction, "a number")]
    _use_columns(source, features, columns)
    for column in columns:
        feature = features[column]
        if not (is_fraction(feature) or is_integer(feature) or is_text(feature)):
            raise ValueError(
                f"label column {column!r} is of type {kind(feature)}; a regression learns whole numbers and fractions;"
                f" {_other_kind(feature, column)}"
            )
    check_columns(source)
    return source


def _use_columns(source: RowSource, features: Features, columns: list[str]) -> None:
    for column in columns:
        require_column(column, features)
    if len(set(columns)) < len(columns) or not columns:
        raise ValueError(f"label_column {columns} names a column twice, or none; name each column once")
    source.columns, source.class_names = columns, list(columns)
    source.label_column, source.places = columns[0], list(range(len(columns)))


def _only(features: Features, names: Sequence[str], fits: Any, what: str) -> str:
    """The one column that fits; the one with a usual name, where several do or none says so by its type."""
    found = [name for name, feature in features.items() if fits(feature)]
    usual = [name for name in found or features if name in names]
    if len(found) != 1 and len(usual) == 1:
        found = usual
    if len(found) == 1:
        return str(found[0])
    raise ValueError(
        f"{len(found) or 'no'} columns with {what} among {describe(features)}; name one with label_column, or several:"
        " label_column [a, b]"
    )


def _is_list(feature: Any) -> bool:
    if not isinstance(feature, List | LargeList):
        return False
    return is_label(feature.feature) or isinstance(feature.feature, ClassLabel)


def _is_pair(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) and len(feature.names) == 2


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

    def find_source(self) -> Source:
        """Load the dataset and find its columns and classes."""
        return load_multi_label(self.dataset, self.data_files, self.data_dir, self.reading)


class RegressionDataModule(ImageDataModule):
    """Batches of pictures with numbers; ``labels`` are ``(B, numbers)`` of ``float32``, as they are stored.

    The names of the numbers are those of their columns. Options are those of :class:`ImageDataModule`.
    """

    def find_source(self) -> Source:
        """Load the dataset and find its columns."""
        return load_numbers(self.dataset, self.data_files, self.data_dir, self.reading)

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
        sizes = ", ".join(f"{name} {size:,}" for name, size in self.split_sizes.items())
        lines = [f"pictures with all numbers: {sizes}"]
        for name, values in zip(self.load().class_names, self._labels["train"].T, strict=True):
            spread = f"{values.mean():.6g} +- {values.std():.6g}"
            lines.append(f"{one_line(name)}: {values.min():.6g} to {values.max():.6g}, mean {spread}")
        rank_zero_info("\n".join(lines))
