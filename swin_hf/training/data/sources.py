"""Finding pictures and labels in anything that ``datasets`` can read: :func:`load_source`."""

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, LargeList, List, Value

from swin_hf.folders import SPLIT_NAMES, UNLABELLED_REMEDY

from .reading import FORMATS, DataFiles, Reading, find_folder, flat, read
from .sampling import Integers
from .shards import cells_of, shorten

LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "category", "target")
BOX_NAMES = ("bbox", "bboxes", "boxes", "objects")
IMAGE_NAMES = ("image", "img", "picture", "path", "file", "filename", "file_name", "image_path")
Targets = np.ndarray[Any, Any]  # of each row: a class id, or a row of numbers
Kind = Callable[[str, Any], bool]  # whether a name and a feature are those of a kind of column
UNLABELLED = -1  # the Hub's convention for a test split whose labels are kept secret


@dataclass
class Source:
    """What was found: the splits, and where in them the pictures and labels are."""

    splits: dict[str, Dataset | IterableDataset]  # of train, validation and test, in this order; images not decoded
    image_column: str
    label_column: str | None = None  # None for pictures without labels
    class_names: list[str] = field(default_factory=list)  # of each class id, in order; empty without labels
    encode: dict[Any, int] | None = None  # from a stored label to its class id where they differ
    roots: dict[str, str | None] = field(default_factory=dict)  # folder that relative paths of a split start from
    left_out: dict[str, int] = field(default_factory=dict)  # files of each class that were found but cannot be used

    @property
    def reference(self) -> str:
        """The split whose columns and classes are those of the data: ``train``, or the first that there is."""
        return next(iter(self.splits))

    @property
    def features(self) -> Features:
        """The columns of the data."""
        return self.splits[self.reference].features

    @property
    def num_shards(self) -> int:
        """Shards of the training stream."""
        return int(self.splits[self.reference].num_shards)

    # What other kinds of labels replace, in :mod:`swin_hf.training.data.targets`.

    def find_labels(self, reading: Reading, dataset: str) -> None:
        """Find the column of the labels and the classes; ValueError if there are none, or they are of another kind."""
        wanted = reading.label_column
        if isinstance(wanted, list):
            raise ValueError(
                f"label_column names {len(wanted)} columns, and a class for each picture is one; several are learned"
                " with --task multi-label-classification (0 or 1 for each class) or image-regression (numbers)"
            )
        in_place = ", or give data_dir, a folder of one folder for each class, in place of data_files"
        self.label_column = find_column(
            self.features, "label column", "label_column", wanted,
            lambda _, feature: isinstance(feature, ClassLabel),
            lambda name, feature: name in LABEL_NAMES and is_label(feature),
            # Of another type, which name_classes refuses.
            lambda name, feature: name in (*LABEL_NAMES, *BOX_NAMES) and type(feature) is not Image,
            usual=LABEL_NAMES, more=(in_place if dataset == "imagefolder" else "") + UNLABELLED_REMEDY,
        )  # fmt: skip
        self.name_classes(self.features[self.label_column], reading)
        if len(self.class_names) < 2 and "train" in self.splits:
            raise ValueError(
                f"label column {self.label_column!r} has a single class, {self.class_names}; a classifier needs two"
                " (of a folder of pictures, give the one whose folders are the classes)"
            )

    @property
    def label_columns(self) -> list[str]:
        """The columns that the target of a row is made of."""
        return [] if self.label_column is None else [self.label_column]

    def values(self) -> Iterable[Any]:
        """The stored labels of the reference split."""
        return cells_of(self.splits[self.reference], str(self.label_column))

    def target(self, cells: Mapping[str, Any]) -> Any:
        """What is learned of a row."""
        return self.class_id(cells[str(self.label_column)])

    def labels(self, split: str) -> Targets:
        """Class id of every row of a map-style split; :data:`UNLABELLED` where there is none."""
        cells = cells_of(self.splits[split], str(self.label_column))
        labels = np.array([self.class_id(cell) for cell in cells], dtype=np.int64)
        self.counts(labels)
        return labels

    def labelled(self, labels: Targets) -> Targets:
        """Which of the rows have a label, booleans."""
        return np.asarray(labels != UNLABELLED)

    def strata(self, labels: Targets) -> Integers:
        """A number for each labelled row; rows of one number are held out in proportion."""
        return labels

    def counts(self, labels: Targets) -> Integers:
        """Number of rows of each class; ValueError if a number is not that of a class."""
        known, classes = labels[labels != UNLABELLED], len(self.class_names)
        if len(known) and (known.min() < 0 or known.max() >= classes):
            raise ValueError(f"class ids run from {known.min()} to {known.max()}, but there are {classes} classes")
        return np.bincount(known, minlength=classes)

    def reorder(self, labels: Targets, order: Sequence[int]) -> Targets:
        """Labelled rows with the classes numbered as :meth:`renumber` has been told."""
        return np.asarray(order)[labels]

    def check_training(self, labels: Targets) -> None:
        """Refuse training rows that are all of one class: they teach nothing."""
        if len(present := np.unique(labels)) == 1:
            raise ValueError(
                f"all training pictures are of one class, {self.class_names[int(present[0])]!r}; a classifier needs two"
            )

    def class_id(self, cell: Any) -> int:
        """Class id of a stored label; blanks around a text do not count, and an empty one means that there is none."""
        cell = _bare(cell)
        if cell is None:
            return UNLABELLED
        if self.encode is None:
            return int(cell)
        if cell not in self.encode:
            raise ValueError(
                f"label {cell!r} of column {self.label_column!r} is none of the {len(self.class_names)} classes"
                f" {shorten(self.class_names)}, those of the training split, or of class_names where it is given;"
                " correct the label, or name all classes with class_names"
            )
        return self.encode[cell]

    def renumber(self, order: Sequence[int], names: Sequence[str]) -> None:
        """Number the classes as a model does, whose number of each is in ``order`` and whose classes are ``names``."""
        encode = self.encode or {UNLABELLED: UNLABELLED, **{number: number for number in range(len(self.class_names))}}
        self.encode = {cell: order[number] if number != UNLABELLED else number for cell, number in encode.items()}
        self.class_names = list(names)

    def name_classes(self, feature: Any, reading: Reading) -> None:
        """Find the classes of the label column, and the class id of each value that it holds.

        ValueError if the values of the ``feature`` are not labels, or contradict the names that the user gave.
        """
        column, names = self.label_column, reading.class_names
        declared = [str(n) for n in range(names)] if isinstance(names, int) else list(names or [])
        if isinstance(feature, ClassLabel):
            self.class_names = list(feature.names)
            if names is not None and declared != self.class_names:
                theirs = f"label column {column!r} declares {shorten(self.class_names)}"
                raise ValueError(f"class_names says {shorten(declared)}, but {theirs}; leave class_names out")
        elif not is_label(feature):
            gap = ""
            if is_fraction(feature) and not reading.streaming:  # so tables hold whole numbers where a value is missing
                cells = np.array(self.values(), dtype=np.float64)
                missing = np.flatnonzero(np.isnan(cells))
                if len(missing) and not np.any(cells[~np.isnan(cells)] % 1):
                    row = f"row {missing[0]} of {self.reference!r}"
                    gap = f", because {row} has no value (write {UNLABELLED} for a picture without a label)"
            raise ValueError(
                f"label column {column!r} is of type {kind(feature)}{gap}; class labels are a ClassLabel, text,"
                f" integers or true and false; {remedy(feature, str(column))}"
            )
        elif names is not None:
            numbers = range(len(declared))
            values = declared if is_text(feature) else [False, True] if feature.dtype == "bool" else numbers
            self.encode = dict(zip(values, numbers, strict=False)) | {UNLABELLED: UNLABELLED}
            if is_text(feature) and not any(name.isdecimal() for name in declared):  # the number of a class in a table
                self.encode |= {str(number): number for number in numbers}
            self.class_names = declared
        elif reading.streaming:
            raise ValueError(
                f"label column {column!r} holds {kind(feature)} values, and a stream does not tell which"
                " classes will come; say it with class_names (their names, or their number), or do not stream"
            )
        else:
            known = natural_order(set(map(_bare, self.values())) - {None, UNLABELLED})
            self.encode = {value: index for index, value in enumerate(known)} | {UNLABELLED: UNLABELLED}
            self.class_names = [str(value) for value in known]


def load_source(
    dataset: str,
    data_files: DataFiles | None = None,
    data_dir: str | None = None,
    reading: Reading = Reading(),
    source_class: type[Source] | None = Source,
) -> Source:
    """Load a dataset and find its pictures and labels.

    The first four arguments are those of :class:`~swin_hf.training.ImageDataModule`; ``source_class`` says what the
    labels are, and None finds only the pictures.

    Raises:
        FileNotFoundError: If a local file or folder is missing.
        ValueError: If columns, labels or splits are missing, ambiguous or contradictory.
    """
    folder = find_folder(dataset, data_files, data_dir, reading)
    splits, left_out = read(folder, data_files, data_dir, reading)
    image = find_column(
        next(iter(splits.values())).features, "image column", "image_column", reading.image_column,
        lambda _, feature: isinstance(feature, Image),
        lambda name, feature: name in IMAGE_NAMES and is_text(feature),  # a table with the paths of pictures
    )  # fmt: skip
    splits = {name: split.cast_column(image, Image(decode=False)) for name, split in splits.items()}
    source = (source_class or Source)(splits, image, left_out=left_out)
    find_roots(source, folder, data_files, data_dir)
    if source_class is not None and (reading.labelled or source_class is not Source):
        source.find_labels(reading, dataset)
    for name, split in splits.items():
        if missing := [column for column in source.label_columns if column not in split.features]:
            columns = describe(split.features)
            raise ValueError(f"split {name!r} has no column {missing[0]!r}; its columns are {columns}")
    return source


def find_roots(source: Source, dataset: str, data_files: DataFiles | None, data_dir: str | None) -> None:
    """Find the folders that the paths of a source which was read start from; refuse an empty split."""
    for name, split in source.splits.items():
        if isinstance(split, Dataset) and len(split) == 0:
            columns = list(source.features)
            raise ValueError(f"split {name!r} of {dataset!r} is empty: it has columns {columns} and no row")
    if data_dir is not None and os.path.isdir(dataset) and dataset not in FORMATS:
        data_dir = os.path.join(dataset, data_dir)
    source.roots = {name: _root(source, name, data_files, data_dir) for name in source.splits}


def _root(source: Source, split: str, data_files: DataFiles | None, data_dir: str | None) -> str | None:
    """Folder that relative image paths of a split start from; ValueError if its files are in several folders."""
    if data_dir is not None:
        return data_dir
    names = SPLIT_NAMES.get(split, (split,))
    if isinstance(data_files, Mapping) and any(name in data_files for name in names):
        data_files = [file for name in names for file in flat(data_files.get(name))]
    patterns = [file for file in flat(data_files) if "://" not in file]
    files = [file for pattern in patterns for file in glob.glob(pattern, recursive=True) or [pattern]]
    folders = sorted({os.path.dirname(file) for file in files})
    if len(folders) < 2:
        return folders[0] if folders else None
    first: dict[str, Any] = next(iter(source.splits[split]), {})
    cell = first.get(source.image_column) or {}
    path = cell.get("path")
    if path and cell.get("bytes") is None and "://" not in path and not os.path.isabs(path):
        raise ValueError(
            f"the files of split {split!r} are in {len(folders)} folders ({shorten(folders, 3)}), so it is unclear"
            f" where the relative path {path!r} starts; give data_dir (paths start there), or write absolute paths"
        )
    return None


def find_column(
    features: Features, what: str, option: str, wanted: str | None, *kinds: Kind,
    usual: Sequence[str] = (), more: str = "",
) -> str:  # fmt: skip
    """The column that an option names (``wanted``), or else the only one of the first of the ``kinds`` that there is.

    Of several of a kind, one with a ``usual`` name is taken. ValueError if it does not exist, or there is none or more
    than one; ``what`` it is, and what ``more`` to do where there is none, are for the message.
    """
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"{option} {wanted!r} does not exist; the columns are {describe(features)}")
        return wanted
    found = next(filter(None, ([n for n, feature in features.items() if fits(n, feature)] for fits in kinds)), [])
    if len(found) > 1 and len(some := [name for name in found if name in usual]) == 1:
        found = some
    if len(found) == 1:
        return str(found[0])
    problem = f"{len(found)} {what.replace('column', 'columns')} {found}" if found else f"no {what}"
    raise ValueError(f"{problem} among {describe(features)}; name one with {option}{'' if found else more}")


def is_text(feature: Any) -> bool:
    """Whether a feature holds strings."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def is_integer(feature: Any) -> bool:
    """Whether a feature holds integers that are not yet class ids."""
    return "int" in str(getattr(feature, "dtype", "")) and not isinstance(feature, ClassLabel)


def is_fraction(feature: Any) -> bool:
    """Whether a feature holds floating-point numbers."""
    return isinstance(feature, Value) and "float" in feature.dtype


def is_label(feature: Any) -> bool:
    """Whether a feature holds values that mean classes: text, integers or true and false."""
    return is_text(feature) or is_integer(feature) or getattr(feature, "dtype", None) == "bool"


def describe(features: Features) -> str:
    """Return ``name (type)`` of every column."""
    return ", ".join(f"{name} ({kind(feature)})" for name, feature in features.items())


def kind(feature: Any) -> str:
    """Return the type of a column: that of its values, or the name of the feature."""
    if isinstance(feature, List | LargeList):
        return f"list of {kind(feature.feature)}"
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__


def remedy(feature: Any, column: str) -> str:
    """What to do with a column of labels of a kind that its task cannot learn, as the end of a sentence."""
    inner, depth = feature, 0
    while isinstance(inner, List | LargeList):
        inner, depth = inner.feature, depth + 1
    names = {column, *(inner if isinstance(inner, dict) else ())}
    if names & {*BOX_NAMES} or (depth == 2 and is_fraction(inner)):
        return (
            "bounding boxes are learned by no task here; name a column with the classes of each picture: label_column"
        )
    if isinstance(inner, dict) and not depth:
        return "a dictionary is several columns: make them with flatten() of datasets, and name one with label_column"
    if isinstance(inner, dict) or depth > 1:
        return "lists of lists or dictionaries are learned by no task here; write one list of labels for each picture"
    if depth and (is_label(inner) or isinstance(inner, ClassLabel)):
        return "several labels of a picture are learned with --task multi-label-classification"
    if isinstance(inner, Value) and inner.dtype.startswith(("date", "time", "duration")):
        return "dates are neither classes nor numbers: write the year, say, as a number"
    if depth == 0 and is_fraction(inner):
        return "numbers are learned with --task image-regression"
    return "name another column with label_column"


def natural_order(values: Iterable[Any]) -> list[Any]:
    """Sort labels; texts that are all numbers come in the order of the numbers (1, 2, 10, not 1, 10, 2)."""
    values = list(values)
    if all(isinstance(value, str) and value.isdecimal() for value in values):
        return sorted(values, key=lambda value: (int(value), value))  # 7 and 007 are two classes
    return sorted(values)


def _bare(cell: Any) -> Any:
    """A label without blanks around it; None where nothing is left."""
    return (cell.strip() or None) if isinstance(cell, str) else cell


def fingerprint(source: Source) -> str:
    """Hash what the training split (or the first that there is) holds, independently of paths, caches and machines.

    Columns, class names, the number of rows, all labels and the bytes of up to 64 evenly spaced pictures enter, with
    their masks; of a stream, only what it declares.
    """
    train = source.splits[source.reference]
    digest = hashlib.sha256(repr((sorted(train.features), source.class_names)).encode())
    if isinstance(train, Dataset):
        digest.update(str(len(train)).encode())
        if source.label_column is not None:
            digest.update(source.labels(source.reference).tobytes())
        stored = [name for name, kind in train.features.items() if isinstance(kind, Image) and not kind.decode]
        train, root = train.select_columns(stored), source.roots.get(source.reference) or ""
        for row in np.linspace(0, len(train) - 1, num=min(64, len(train)), dtype=int):
            for cell in train[int(row)].values():
                path = Path(root, (cell or {}).get("path") or "")
                if (cell or {}).get("bytes") is not None:
                    digest.update(cell["bytes"])
                elif path.is_file():
                    digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
