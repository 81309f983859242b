"""From files to splits: folders of pictures, tables, and shards that declare their classes each for itself.

``datasets`` reads the files. What it would guess or pass over is settled here.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, load_dataset, load_dataset_builder
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from swin_hf import folders
from swin_hf.folders import SPLIT_NAMES, split_of
from swin_hf.processing import PICTURE_SUFFIXES
from swin_hf.ranges import Options, check_range, choice, ranged

from ..bundled import find_data_set
from .hub_pictures import copy_pictures
from .shards import cells_of, load_files, shorten, unite

DataFiles = str | list[str] | dict[str, str | list[str]]

SPLIT_COLUMNS = ("split", "fold", "set")
UNFINISHED = ".unfinished"  # folder of what swin-hf prepare has not finished
FORMATS = ("parquet", "webdataset", "csv", "json", "imagefolder", "arrow")
HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+")
OnError = Literal["raise", "skip", "replace"]


@dataclass(frozen=True)
class Reading(Options):
    """How a data set is read, beyond its name and files.

    Args:
        config_name: Configuration of a Hub dataset.
        revision: Branch, tag or commit of a Hub dataset.
        streaming: Read while training, without a local copy; needs trainer.limit_train_batches.
        image_column: Image column; found by type when there is only one.
        label_column: Label column; found by type when there is only one. Several, for several labels or numbers.
        labelled: False for pictures without labels, as in pre-training.
        class_names: Names of the classes, or their number, where the data do not declare them as a ClassLabel; a stream
            of such data needs it. Integer labels count from 0.
        seed: Seed of the order and of the augmentation; seed_everything's if not given.
        on_error: What to do with an unreadable picture: raise, skip, or replace (by another one, in training only).
    """

    config_name: str | None = None
    revision: str | None = None
    streaming: bool = False
    image_column: str | None = None
    label_column: str | list[str] | None = None
    labelled: bool = True
    class_names: list[str] | int | None = None
    seed: int | None = ranged(None, "[0, 4294967295]")
    on_error: OnError = choice("raise", OnError)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_class_names("class_names", self.class_names, "[1, inf)")


def check_class_names(option: str, names: list[str] | int | None, interval: str) -> None:
    """Refuse a number of classes that is not in an interval, and names that come twice."""
    if not isinstance(names, list):
        check_range(option, names, interval)
    elif len(set(names)) < len(names):
        raise ValueError(f"{option} {shorten(names)} names a class twice")


def read(
    dataset: str, data_files: DataFiles | None, data_dir: str | None, reading: Reading
) -> tuple[dict[str, Any], dict[str, int]]:
    """Read ``train``, ``validation`` and ``test``, those that there are, in this order.

    Returns:
        The splits; and of each class, the number of files that were found but cannot be used.
    """
    folder = picture_folder(dataset, data_files, data_dir)
    tables = [] if folder is None else folders.metadata_files(folder)
    roots = _split_roots(data_files, data_dir) if dataset == "imagefolder" and data_files is not None else {}
    left_out: dict[str, int] = {}
    stored: Mapping[str, list[Any]]
    if roots or (folder is not None and not tables):
        labelled = reading.labelled
        content = folders.read_splits(roots, labelled) if roots else folders.read_folder(str(folder), labelled)
        for note in content.notes:
            rank_zero_warn(note)
        stored, left_out = {name: [split] for name, split in content.splits.items()}, content.left_out
    elif folder is not None:
        stored = _read_metadata(os.path.abspath(folder), tables)
    else:
        stored = _load(dataset, data_files, data_dir, reading)
    named = {ours: stored[theirs] for ours, names in SPLIT_NAMES.items() for theirs in names if theirs in stored}
    if not named and len(stored) == 1:  # an unusual name, but there is no other
        named = {"train": next(iter(stored.values()))}
    if not named:
        raise ValueError(f"no training split among {sorted(stored)}; name the files of each split in data_files")
    pieces = {  # streams of formats such as json declare their columns by their first rows
        name: [part._resolve_features() if isinstance(part, IterableDataset) else part for part in parts]
        for name, parts in named.items()
    }
    splits = _split_by_column(unite(pieces), reading.label_column)
    if reading.streaming:
        splits = {name: s.to_iterable_dataset() if isinstance(s, Dataset) else s for name, s in splits.items()}
    return splits, left_out


def picture_folder(dataset: str, data_files: DataFiles | None, data_dir: str | None) -> str | None:
    """The folder of pictures that a source is; None for any other source."""
    if data_files is not None or (dataset in FORMATS and dataset != "imagefolder"):
        return None
    folder = (data_dir or ".") if dataset == "imagefolder" else os.path.join(dataset, data_dir or "")
    is_one = os.path.isdir(folder) and (dataset == "imagefolder" or folders.is_picture_folder(folder))
    return folder if is_one else None


def _read_metadata(root: str, files: Sequence[str]) -> dict[str, list[Any]]:
    """Read pictures that tables name in their column ``file_name``, and say which are on one side only.

    As with ``datasets``, they become the column ``image``, and those of a column ``NAME_file_name`` the column NAME.
    A row belongs to the split after which the first folder of its path is named, where all rows have such a folder.
    """
    tables, listed = [], set()
    for file in files:
        kind = {".csv": "csv", ".parquet": "parquet"}.get(os.path.splitext(file)[1], "json")
        (table,) = load_files(kind, {"train": [file]}, streaming=False)["train"]
        columns = [column for column in table.features if f"_{column}".endswith("_file_name")]
        if not columns:
            raise ValueError(
                f"{file} has the columns {', '.join(table.features)}; it must name the pictures in a column file_name"
            )
        paths: list[str] = []
        for column in columns:
            names = cells_of(table, column)
            if None in names:
                raise ValueError(f"{file} has no {column} in row {names.index(None)}; name one, or leave the row out")
            paths = [os.path.normpath(os.path.join(os.path.dirname(file), name)) for name in names]
            cells = [{"bytes": None, "path": path} for path in paths]
            name = "image" if column == "file_name" else column.removesuffix("_file_name")
            table = table.remove_columns(column).add_column(name, cells, feature=Image(decode=False))
            listed.update(paths)
        tables.append((table, paths))
    missing = sorted(path for path in listed if not os.path.isfile(path))
    if missing:
        rank_zero_warn(f"{len(missing)} pictures that the metadata name do not exist, such as {missing[0]}")
    unlisted = [path for path in folders.list_pictures(root)[0] if path not in listed]
    if unlisted:
        rank_zero_warn(f"{root}: {len(unlisted)} pictures, such as {unlisted[0]}, are not used: no metadata name them")
    first = {path: os.path.relpath(path, root).split(os.sep)[0] for path in listed}
    divided = all(split_of(name) for name in first.values())
    pieces: dict[str, list[Any]] = {}
    for table, paths in tables:
        splits = np.array([(split_of(first[path]) if divided else None) or "train" for path in paths])
        for split in dict.fromkeys(splits.tolist()):
            pieces.setdefault(split, []).append(table.select(np.flatnonzero(splits == split)))
    return pieces


def _split_by_column(splits: dict[str, Any], label_column: str | list[str] | None) -> dict[str, Any]:
    """Use a column with the names of splits as the split, and say so; or say that a column is not used as such."""
    data = next(iter(splits.values()))
    columns = [n for n in data.features if n.strip().lower() in SPLIT_COLUMNS and n not in flat(label_column)]
    if len(splits) > 1 or not columns:
        return splits
    column, feature = columns[0], data.features[columns[0]]
    if not isinstance(data, Dataset):
        rank_zero_warn(
            f"column {column!r} is not used as the split, for the rows of a stream are not known; give the files of"
            " each split in data_files, or do not stream"
        )
        return splits
    cells = cells_of(data, column)
    if isinstance(feature, ClassLabel):
        cells = [None if cell is None else feature.names[cell] for cell in cells]
    found = np.array([split_of(cell) if isinstance(cell, str) else None for cell in cells])
    divided = {split: np.flatnonzero(found == split) for split in SPLIT_NAMES}
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in divided.items() if len(rows))
    others = Counter(str(cell) for cell, split in zip(cells, found.tolist(), strict=True) if split is None)
    values = ", ".join(f"{value} ({count} rows)" for value, count in others.most_common(5))
    if not sizes:
        rank_zero_info(f"column {column!r} is not used as the split: it has no names of splits, but {values}")
        return splits
    rank_zero_info(f"column {column!r} is used as the split: {sizes}")
    if others:
        rank_zero_warn(
            f"{others.total()} rows are not used, for column {column!r} has no name of a split there: {values}; the"
            f" names are {', '.join(name for names in SPLIT_NAMES.values() for name in names)}"
        )
    return {split: data.select(rows) for split, rows in divided.items() if len(rows)}


def _split_roots(data_files: DataFiles, data_dir: str | None) -> dict[str, str]:
    """Folder of each split where ``data_files`` names whole folders: ``{train: FOLDER}``, or ``FOLDER/**``."""
    for file in flat(data_files):
        if file.lower().endswith(folders.ARCHIVES):
            raise ValueError(f"{file} is an archive, which is not opened; unpack it, and give data_dir")
    roots: dict[str, str] = {}
    for name, patterns in _by_split(data_files).items():
        root = os.path.join(data_dir or "", patterns[0].rstrip("/*")) if len(patterns) == 1 else ""
        if (split := split_of(name)) is None or not os.path.isdir(root):
            return {}
        roots[split] = root
    return roots


def _load(
    dataset: str, data_files: DataFiles | None, data_dir: str | None, reading: Reading
) -> Mapping[str, list[Any]]:
    """Pieces of each stored split, under its own name."""
    streaming = reading.streaming
    folder = Path(data_dir if dataset == "arrow" and data_dir else dataset)
    if (folder / "dataset_dict.json").is_file():
        return {name: [split] for name, split in DatasetDict.load_from_disk(str(folder)).items()}
    if (folder / "state.json").is_file():
        return {"train": [Dataset.load_from_disk(str(folder))]}
    options: dict[str, Any] = {"data_files": data_files, "data_dir": data_dir, "revision": reading.revision}
    try:
        if dataset in FORMATS or os.path.isdir(dataset):
            options |= _literal(data_files, data_dir)
            builder = load_dataset_builder(dataset, name=reading.config_name, **options)
            declared = builder.info.features is not None  # by the README of a folder: holds for all files
            by_file = ("parquet", "arrow", "csv") if streaming else ("parquet", "arrow", "csv", "json")
            if builder.name in by_file and not declared:
                files = {  # with data_dir alone, datasets takes every file in it for a table
                    split: [path for path in paths if not path.lower().endswith(PICTURE_SUFFIXES)]
                    for split, paths in builder.config.data_files.items()
                }
                return load_files(builder.name, {split: paths for split, paths in files.items() if paths}, streaming)
        loaded = load_dataset(dataset, name=reading.config_name, **options, streaming=streaming)
    except ValueError as error:
        if "corresponds to no data" in str(error):  # datasets' words for a split without rows
            raise ValueError(f"a split of {dataset!r} is empty: {error}") from error
        raise
    return {name: [split] for name, split in loaded.items()}


def _literal(data_files: DataFiles | None, data_dir: str | None) -> dict[str, Any]:
    """Escape what ``datasets`` would take for patterns: folders, and names with brackets of files that exist."""

    def escape(file: str) -> str:
        return glob.escape(file) if os.path.exists(os.path.join(data_dir or "", file)) else file

    files = None
    if data_files is not None:
        files = {split: [escape(file) for file in some] for split, some in _by_split(data_files).items()}
    folder = glob.escape(data_dir) if data_dir is not None and "://" not in data_dir else data_dir
    return {"data_files": files, "data_dir": folder}


def find_folder(dataset: str, data_files: DataFiles | None, data_dir: str | None, reading: Reading) -> str:
    """Check that local files are there, and find the folder of a data set of the package or of pictures on the Hub.

    Any other name is returned as it is.

    Raises:
        FileNotFoundError: If a local file or folder is missing.
        HubError: If there is no such data set on the Hub.
    """
    if dataset in FORMATS:
        _check_files(data_files, data_dir, data_dir or "")
        return dataset
    dataset = find_data_set(dataset)
    if not os.path.isdir(dataset):
        if os.path.exists(dataset) or not HUB_ID.fullmatch(dataset) or os.path.isdir(os.path.dirname(dataset)):
            raise FileNotFoundError(
                f"dataset {dataset!r} is not a folder (looked in {Path.cwd()}); give a folder, user/name of a data set"
                f" on the Hub, or a format ({', '.join(FORMATS)}) and its files in data_files"
            )
        chosen = data_files is not None or reading.config_name is not None
        copy = None if chosen else copy_pictures(dataset, data_dir, reading.revision, reading.streaming)
        return copy or dataset
    if os.path.isdir(os.path.join(dataset, UNFINISHED)):
        raise ValueError(f"{dataset} is not finished; give the command again that began it: swin-hf prepare")
    folder = os.path.join(dataset, data_dir or "")
    _check_files(data_files, folder if data_dir is not None else None, folder)
    return dataset


def _check_files(data_files: DataFiles | None, data_dir: str | None, start: str) -> None:
    """Raise ``FileNotFoundError`` for a local file or folder that is not there; patterns and URLs pass."""
    if data_dir is not None and "://" not in data_dir and not Path(data_dir).is_dir():
        raise FileNotFoundError(f"data_dir {data_dir!r} is not a folder (looked in {Path.cwd()})")
    for file in flat(data_files):
        is_one = "://" not in file and not set(file) & set("*?[")
        if is_one and not Path(start, file).exists():
            raise FileNotFoundError(f"data file {file!r} does not exist (looked in {Path(start).resolve()})")


def flat(data_files: DataFiles | None) -> list[str]:
    """The patterns of ``data_files`` in one list."""
    if isinstance(data_files, Mapping):
        return [file for files in data_files.values() for file in flat(files)]
    return [data_files] if isinstance(data_files, str) else list(data_files or ())


def _by_split(data_files: DataFiles) -> dict[str, list[str]]:
    """The patterns of each split; those of no split are of ``train``."""
    named = data_files if isinstance(data_files, Mapping) else {"train": data_files}
    return {split: flat(files) for split, files in named.items()}
