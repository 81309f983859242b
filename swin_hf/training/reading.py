"""From files to splits: folders of pictures, tables, and shards that declare their classes each for itself.

``datasets`` reads the files. What it would guess or pass over is settled here: the splits and classes of folders
(:mod:`swin_hf.folders`), the text of a table's cells, and class ids that files number differently.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    load_dataset,
    load_from_disk,
)
from lightning.pytorch.utilities import rank_zero_warn

from swin_hf.folders import (
    ARCHIVES,
    SPLIT_NAMES,
    PictureFolder,
    is_picture_folder,
    metadata_files,
    read_folder,
    read_splits,
    split_of,
)

DataFiles = str | list[str] | dict[str, str | list[str]]
Split = Dataset | IterableDataset

FORMATS = ("parquet", "webdataset", "csv", "json", "imagefolder", "arrow")


@dataclass
class Raw:
    """Splits as they were read.

    Attributes:
        splits: Those of ``train``, ``validation`` and ``test`` that there are, in this order.
        left_out: Files of each class that were found but cannot be used.
    """

    splits: dict[str, Any]
    left_out: dict[str, int] = field(default_factory=dict)


def read(
    dataset: str,
    data_files: DataFiles | None,
    data_dir: str | None,
    config_name: str | None,
    revision: str | None,
    streaming: bool,
    labelled: bool,
) -> Raw:
    """Read the splits of a source; the arguments are those of :func:`swin_hf.training.sources.load_source`."""
    folder = _picture_folder(dataset, data_files, data_dir, labelled)
    if folder is not None:
        for note in folder.notes:
            rank_zero_warn(note)
        splits = {name: folder.splits[name] for name in SPLIT_NAMES if name in folder.splits}
        return Raw(_streams(splits) if streaming else splits, folder.left_out)
    raw = _load(dataset, data_files, data_dir, config_name, revision, streaming)
    splits = _name_splits(raw)
    if streaming:  # formats such as csv declare their columns by their first rows
        splits = {name: split._resolve_features() for name, split in splits.items()}
    return Raw(splits)


def _picture_folder(
    dataset: str, data_files: DataFiles | None, data_dir: str | None, labelled: bool
) -> PictureFolder | None:
    """Read a folder of pictures, where that is what the source is."""
    if dataset == "imagefolder" and data_files is not None:
        for file in flat(data_files):
            if file.lower().endswith(ARCHIVES):
                raise ValueError(f"{file} is an archive, which is not opened; unpack it, and give data_dir")
        roots = _split_roots(data_files, data_dir)
        return read_splits(roots, labelled) if roots else None
    folder = (data_dir or ".") if dataset == "imagefolder" else os.path.join(dataset, data_dir or "")
    if (dataset in FORMATS and dataset != "imagefolder") or data_files is not None or not os.path.isdir(folder):
        return None
    if metadata_files(folder) or not (dataset == "imagefolder" or is_picture_folder(folder)):
        return None
    return read_folder(folder, labelled)


def _split_roots(data_files: DataFiles, data_dir: str | None) -> dict[str, str]:
    """Folder of each split where ``data_files`` names whole folders: ``{train: FOLDER}``, or ``FOLDER/**``."""
    named = data_files if isinstance(data_files, Mapping) else {"train": data_files}
    roots: dict[str, str] = {}
    for name, files in named.items():
        patterns = flat(files)
        if len(patterns) != 1 or (split := split_of(name)) is None:
            return {}
        root = os.path.join(data_dir or "", patterns[0].rstrip("/*"))
        if not os.path.isdir(root):
            return {}
        roots[split] = root
    return roots


def _streams(splits: Mapping[str, Dataset]) -> dict[str, IterableDataset]:
    return {name: split.to_iterable_dataset() for name, split in splits.items()}


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
        return _streams(stored) if streaming else stored
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
    """Give the splits our names, in the order of :data:`SPLIT_NAMES`."""
    found = {ours: raw[theirs] for ours, names in SPLIT_NAMES.items() for theirs in names if theirs in raw}
    if not found and len(raw) == 1:  # an unusual name, but there is no other
        found = {"train": next(iter(raw.values()))}
    if not found:
        raise ValueError(f"no training split among {sorted(raw)}; name the files of each split in data_files")
    return found


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
