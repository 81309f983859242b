"""Finding pictures and labels in anything that ``datasets`` can read.

:func:`load_source` is the only door: it loads, finds the columns by the type of their features, makes class ids out of
labels that are not yet, and refuses what would otherwise go wrong much later, or never visibly.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Value,
    load_dataset,
    load_from_disk,
)
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

DataFiles = str | list[str] | dict[str, str | list[str]]

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "category", "target")
IMAGE_NAMES = ("image", "img", "picture", "path", "file", "filename", "file_name", "image_path")
UNLABELLED = -1  # the Hub's convention for a test split whose labels are kept secret


@dataclass
class Source:
    """What was found: the splits, and where in them the pictures and labels are.

    Attributes:
        splits: ``train``, and ``validation`` and ``test`` where they exist. Image cells are not decoded.
        image_column: Name of the image column.
        label_column: Name of the label column; None for pictures without labels.
        class_names: Name of each class id, in order; empty without labels.
        encode: From a stored label to its class id where they differ (labels that were text or arbitrary integers).
        root: Folder that relative image paths start from.
        num_shards: Shards of the training stream; 1 unless streaming.
    """

    splits: dict[str, Dataset | IterableDataset]
    image_column: str
    label_column: str | None
    class_names: list[str]
    encode: dict[Any, int] | None = None
    root: str | None = None
    num_shards: int = 1

    def labels(self, split: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Class id of every row of a map-style split; :data:`UNLABELLED` where there is none."""
        cells = self.splits[split].select_columns([self.label_column])[:][self.label_column]
        return np.array([self.class_id(cell) for cell in cells], dtype=np.int64)

    def class_id(self, cell: Any) -> int:
        """Class id of a stored label.

        Raises:
            ValueError: If the label does not occur in the training split.
        """
        if cell is None:
            return UNLABELLED
        if self.encode is None:
            return int(cell)
        if cell not in self.encode:
            raise ValueError(
                f"label {cell!r} of column {self.label_column!r} does not occur in the training split, which has"
                f" {shorten(self.class_names)}"
            )
        return self.encode[cell]


def load_source(
    dataset: str,
    *,
    data_files: DataFiles | None = None,
    data_dir: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    labelled: bool = True,
) -> Source:
    """Load a dataset and find its pictures and labels.

    Args:
        dataset: Hub id, local folder, a folder written by ``save_to_disk``, or a format: ``imagefolder``, ``parquet``,
            ``webdataset``, ``arrow``, ``csv``, ``json``.
        data_files: Files of the format: one pattern, a list, or one or the other for each split.
        data_dir: Folder of the format; ``data_files`` are relative to it.
        config_name: Configuration of a Hub dataset.
        revision: Branch, tag or commit of a Hub dataset.
        streaming: Read while training, without a local copy.
        image_column: Name of the image column; found by type when there is only one.
        label_column: Name of the label column; found by type when there is only one.
        labelled: False for pictures without labels (pre-training).

    Raises:
        FileNotFoundError: If a local file or folder is missing.
        ValueError: If columns, labels or splits are missing, ambiguous or contradictory.
    """
    check_files(data_files, data_dir)
    raw = _load(dataset, data_files, data_dir, config_name, revision, streaming)
    splits = _name_splits(raw)
    root = data_dir or _folder_of_first(data_files)
    features = splits["train"].features
    if features is None:  # a stream of a format that does not declare its columns
        features = next(iter(splits["train"].take(1)), {}).keys()
        raise ValueError(f"the stream does not declare its features (columns {sorted(features)}); use parquet instead")
    image = _find_image(features, image_column)
    splits = {name: split.cast_column(image, Image(decode=False)) for name, split in splits.items()}
    label = _find_label(features, label_column, dataset) if labelled else None
    source = Source(splits, image, label, class_names=[], root=root)
    if streaming:
        source.num_shards = splits["train"].num_shards
    else:
        for name, split in splits.items():
            if len(split) == 0:
                raise ValueError(f"split {name!r} of {dataset!r} is empty: it has columns {list(features)} and no row")
    if label is not None:
        _name_classes(source, features, streaming)
        _check_same_classes(source, label)
        if not streaming:
            _check_nesting(source, dataset)
    return source


def check_files(data_files: DataFiles | None, data_dir: str | None) -> None:
    """Raise ``FileNotFoundError`` for a local file or folder that is not there; patterns and URLs pass."""
    if data_dir is not None and "://" not in data_dir and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"data_dir {data_dir!r} is not a folder (looked in {Path.cwd()})")
    for file in flat(data_files):
        if "://" in file or any(sign in file for sign in "*?["):
            continue
        if not (Path(data_dir or "") / file).exists():
            raise FileNotFoundError(f"data file {file!r} does not exist (looked in {Path(data_dir or '').resolve()})")


def flat(data_files: DataFiles | None) -> list[str]:
    """Return the patterns of ``data_files`` in one list."""
    if data_files is None:
        return []
    if isinstance(data_files, str):
        return [data_files]
    if isinstance(data_files, Mapping):
        return [file for files in data_files.values() for file in flat(files)]
    return list(data_files)


def _folder_of_first(data_files: DataFiles | None) -> str | None:
    files = flat(data_files)
    return os.path.dirname(files[0]) if files and "://" not in files[0] else None


def _load(
    dataset: str,
    data_files: DataFiles | None,
    data_dir: str | None,
    config_name: str | None,
    revision: str | None,
    streaming: bool,
) -> Mapping[str, Any]:
    folder = Path(data_dir if dataset == "arrow" and data_dir else dataset)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        stored = load_from_disk(str(folder))
        stored = stored if isinstance(stored, DatasetDict) else DatasetDict({"train": stored})
        return {name: split.to_iterable_dataset() for name, split in stored.items()} if streaming else stored
    try:
        loaded: Mapping[str, Any] = load_dataset(
            dataset, name=config_name, data_files=data_files, data_dir=data_dir, revision=revision, streaming=streaming
        )
    except ValueError as error:
        if "corresponds to no data" in str(error):  # datasets' words for a split without rows
            raise ValueError(f"a split of {dataset!r} is empty: {error}") from error
        raise
    return loaded


def _name_splits(raw: Mapping[str, Any]) -> dict[str, Any]:
    found = {ours: raw[theirs] for ours, names in SPLIT_NAMES.items() for theirs in names if theirs in raw}
    if not found and len(raw) == 1:  # an unusual name, but there is no other
        found = {"train": next(iter(raw.values()))}
    if "train" not in found:
        raise ValueError(f"no training split among {sorted(raw)}; name the files of each split in data_files")
    return found


def _find_image(features: Features, wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"image_column {wanted!r} does not exist; the columns are {describe(features)}")
        return wanted
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if not images:  # a table with the paths of pictures
        images = [name for name, feature in features.items() if name in IMAGE_NAMES and is_text(feature)]
    if len(images) == 1:
        return str(images[0])
    problem = f"{len(images)} image columns {images}" if images else "no image column"
    raise ValueError(f"{problem} among {describe(features)}; name one with image_column")


def _find_label(features: Features, wanted: str | None, dataset: str) -> str:
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"label_column {wanted!r} does not exist; the columns are {describe(features)}")
        return wanted
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not labels:
        labels = [name for name, f in features.items() if name in LABEL_NAMES and (is_text(f) or is_integer(f))]
    if len(labels) > 1 and len(usual := [name for name in labels if name in LABEL_NAMES]) == 1:
        labels = usual
    if len(labels) == 1:
        return str(labels[0])
    problem = f"{len(labels)} label columns {labels}" if labels else "no label column"
    hint = (
        "; imagefolder makes labels of the folders that hold the pictures, TRAIN/CLASS/PICTURE, and of at least two"
        " of them"
        if dataset == "imagefolder" and not labels
        else ""
    )
    raise ValueError(f"{problem} among {describe(features)}; name one with label_column{hint}")


def is_text(feature: Any) -> bool:
    """Whether a feature holds strings."""
    return getattr(feature, "dtype", None) in ("string", "large_string") and not isinstance(
        feature, (Image, ClassLabel)
    )


def is_integer(feature: Any) -> bool:
    """Whether a feature holds integers that are not yet class ids."""
    return "int" in str(getattr(feature, "dtype", "")) and not isinstance(feature, ClassLabel)


def describe(features: Features) -> str:
    """Return ``name (type)`` of every column."""
    return ", ".join(f"{name} ({kind(feature)})" for name, feature in features.items())


def kind(feature: Any) -> str:
    """Return the type of a column: that of its values, or the name of the feature."""
    return str(feature.dtype) if isinstance(feature, Value) else type(feature).__name__


def shorten(names: Sequence[Any], limit: int = 20) -> str:
    """Return at most ``limit`` names, and how many there are beyond."""
    listed = ", ".join(map(str, names[:limit]))
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


def _name_classes(source: Source, features: Features, streaming: bool) -> None:
    feature = features[source.label_column]
    if isinstance(feature, ClassLabel):
        source.class_names = list(feature.names)
    else:
        if streaming:
            raise ValueError(
                f"label column {source.label_column!r} holds {kind(feature)} values, and a stream does not tell which"
                " classes will come; store it as a ClassLabel (datasets' class_encode_column), or do not stream"
            )
        if not (is_text(feature) or is_integer(feature)):
            raise ValueError(
                f"label column {source.label_column!r} is of type {kind(feature)}; class"
                " labels are a ClassLabel, text or integers"
            )
        cells = set(source.splits["train"].select_columns([source.label_column])[:][source.label_column])
        values = natural_order(cells - {None, UNLABELLED})
        source.encode = {value: index for index, value in enumerate(values)} | {UNLABELLED: UNLABELLED}
        source.class_names = [str(value) for value in values]
    if len(source.class_names) < 2:
        raise ValueError(
            f"label column {source.label_column!r} has a single class, {source.class_names}; a classifier needs two"
        )


def natural_order(values: Iterable[Any]) -> list[Any]:
    """Sort labels; texts that are all numbers come in the order of the numbers (1, 2, 10, not 1, 10, 2)."""
    values = list(values)
    if all(isinstance(value, str) and value.isdecimal() for value in values):
        return sorted(values, key=int)
    return sorted(values)


def _check_same_classes(source: Source, label: str) -> None:
    reference = source.splits["train"].features[label]
    for name, split in source.splits.items():
        if label not in split.features:
            raise ValueError(f"split {name!r} has no column {label!r}; its columns are {describe(split.features)}")
        if isinstance(reference, ClassLabel) and split.features[label].names != reference.names:
            raise ValueError(
                f"split {name!r} numbers its classes differently from train: {shorten(split.features[label].names)}"
                f" against {shorten(reference.names)}; write both with the same ClassLabel"
            )


def _check_nesting(source: Source, dataset: str) -> None:
    """Speak up where imagefolder's labels come from folders inside folders: it takes the innermost name."""
    if dataset != "imagefolder":
        return
    for name, split in source.splits.items():
        cells = split.select_columns([source.image_column])[:][source.image_column]
        folders = {os.path.dirname(cell["path"]) for cell in cells if cell["path"]}
        parents: dict[str, set[str]] = {}
        for folder in folders:
            parents.setdefault(os.path.basename(folder), set()).add(os.path.dirname(folder))
        merged = sorted(label for label, above in parents.items() if len(above) > 1)
        if merged:
            raise ValueError(
                f"split {name!r}: label {merged[0]!r} is the name of {len(parents[merged[0]])} different folders"
                f" ({shorten(sorted(parents[merged[0]]), 3)}); imagefolder labels a picture with the innermost folder,"
                " so keep all pictures of a class in one folder, TRAIN/CLASS/PICTURE"
            )
        if len({above for aboves in parents.values() for above in aboves}) > 1:
            rank_zero_warn(
                f"split {name!r} has folders inside folders; imagefolder labels a picture with the innermost one, here"
                f" {shorten(sorted(parents), 5)}. See the class table for what the model will learn."
            )


def class_table(names: Sequence[str], counts: Mapping[str, np.ndarray[Any, Any]], limit: int = 30) -> str:
    """Return a table of class ids, names and the number of pictures in each split.

    Args:
        names: Name of each class id.
        counts: Pictures of each class, for each split.
        limit: Largest number of classes to list.
    """
    width = max(5, *(len(name) for name in names[:limit]))
    lines = ["".join([f"{'id':>5}  {'class':<{width}}", *(f"{split:>12}" for split in counts)])]
    for index, name in enumerate(names[:limit]):
        lines.append("".join([f"{index:>5}  {name:<{width}}", *(f"{count[index]:>12,}" for count in counts.values())]))
    if len(names) > limit:
        lines.append(f"{'...':>5}  {len(names) - limit} more classes")
    lines.append("".join([f"{'':>5}  {'all':<{width}}", *(f"{count.sum():>12,}" for count in counts.values())]))
    return "\n".join(lines)


def announce_classes(names: Sequence[str], counts: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Print the class table, and warn about classes that cannot be learned."""
    rank_zero_info(f"{len(names)} classes\n{class_table(names, counts)}")
    missing = [name for name, count in zip(names, counts["train"], strict=True) if count == 0]
    if missing:
        rank_zero_warn(f"{len(missing)} classes have no training picture: {shorten(missing)}")


def stratified_split(
    labels: np.ndarray[Any, np.dtype[np.int64]], count: int, seed: int
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Part rows into kept ones and ``count`` held-out ones, with the classes in proportion.

    The rows are sorted by class, at random within each class, and taken at even distances. Every class keeps at
    least one row: ``datasets.train_test_split`` refuses classes with a single picture.

    Args:
        labels: Class id of every row.
        count: Number of rows to hold out; fewer if the classes cannot spare them.
        seed: Seed of the draw.

    Returns:
        Kept and held-out row numbers, each in ascending order.
    """
    random = np.random.default_rng(seed)
    order = np.lexsort((random.random(len(labels)), labels))
    is_first = np.diff(labels[order], prepend=-2) != 0  # one row of each class stays
    spare = order[~is_first]
    count = min(count, len(spare))
    places = ((np.arange(count) + random.random()) * (len(spare) / max(1, count))).astype(np.int64)
    held = np.sort(spare[places])
    return np.setdiff1d(np.arange(len(labels)), held), held


def fingerprint(source: Source) -> str:
    """Hash what the training split holds, independently of paths, caches and machines.

    Columns, class names, the number of rows, all labels and the bytes of up to 64 evenly spaced pictures enter; of a
    stream, only what it declares.
    """
    train = source.splits["train"]
    digest = hashlib.sha256(repr((sorted(train.features), source.class_names)).encode())
    if isinstance(train, Dataset):
        digest.update(str(len(train)).encode())
        if source.label_column is not None:
            digest.update(source.labels("train").tobytes())
        for row in np.linspace(0, len(train) - 1, num=min(64, len(train)), dtype=int):
            cell = train[int(row)][source.image_column]
            digest.update(_stored_bytes(cell, source.root))
    return digest.hexdigest()[:16]


def _stored_bytes(cell: Any, root: str | None) -> bytes:
    if isinstance(cell, Mapping) and cell["bytes"] is not None:
        return bytes(cell["bytes"])
    path = Path(root or "") / cell["path"]
    return path.read_bytes() if path.is_file() else b""


def count_classes(labels: np.ndarray[Any, Any], num_classes: int) -> np.ndarray[Any, Any]:
    """Number of rows of each class id; rows without a label are left out.

    Raises:
        ValueError: If an id is not below ``num_classes``.
    """
    known = labels[labels != UNLABELLED]
    counts = Counter(known.tolist())
    if counts and (min(counts) < 0 or max(counts) >= num_classes):
        raise ValueError(f"class ids run from {min(counts)} to {max(counts)}, but there are {num_classes} classes")
    return np.array([counts[index] for index in range(num_classes)], dtype=np.int64)
