"""Files that declare their columns each for itself: class ids are matched by name, cells of tables stay text.

``datasets`` would read all files with the columns of the first.
"""

import csv
import functools
import glob
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_dataset
from lightning.pytorch.utilities import rank_zero_info

from swin_hf.text import shorten as shorten

SEPARATORS = (",", ";", "\t", "|")


def load_files(kind: str, files: Mapping[str, Sequence[str]], streaming: bool) -> dict[str, list[Any]]:
    """Load parquet, arrow, csv or json files; neighbours in a split that declare the same are loaded in one piece.

    Returns:
        The pieces of each split, in order, for :func:`unite`.
    """
    if kind == "json":
        return {split: [_read_json(path) for path in group] for split, group in files.items()}
    paths = [path for group in files.values() for path in group]
    options: dict[str, Any] = {path: _text_options(path) for path in paths} if kind == "csv" else {}
    declared: dict[str, Any] = options
    if kind != "csv":
        features = {path: _declared_features(path) for path in paths}
        columns = [column for each in features.values() for column in each.items()]
        labels = {name for name, feature in columns if isinstance(getattr(feature, "feature", feature), ClassLabel)}
        declared = {path: [each.get(name) for name in sorted(labels)] for path, each in features.items()}
    pieces: dict[str, list[Any]] = {split: [] for split in files}
    for split, group in files.items():
        for _, neighbours in groupby(group, declared.__getitem__):
            alike = list(neighbours)
            escaped = [path if "://" in path else glob.escape(path) for path in alike]
            loaded = load_dataset(kind, data_files={split: escaped}, streaming=streaming, **options.get(alike[0], {}))
            pieces[split].append(loaded[split])
    return pieces


def _declared_features(file: str) -> Features:
    """Columns that a parquet or arrow file declares."""
    with fsspec.open(file, "rb") as stream:
        if not file.endswith(".arrow"):
            return Features.from_arrow_schema(pq.read_schema(stream))
        try:
            return Features.from_arrow_schema(pa.ipc.open_stream(stream).schema)
        except pa.ArrowInvalid:
            stream.seek(0)
            return Features.from_arrow_schema(pa.ipc.open_file(stream).schema)


def _read_json(file: str) -> Dataset:
    """Read lines of objects, or one list of objects; strings stay what they are, even where they look like dates."""
    with fsspec.open(file, "rt", compression="infer", encoding="utf-8-sig") as stream:
        text = stream.read().strip()
    try:
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]
        columns = dict.fromkeys(name for row in rows for name in row)
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except (json.JSONDecodeError, AttributeError, TypeError, pa.ArrowException) as error:
        raise ValueError(
            f"{file} is neither a list of objects nor one object in each line, with values of one type in each column"
            f" ({error}); correct it, or save the table as CSV"
        ) from error


def _text_options(file: str) -> dict[str, Any]:
    """Options of the ``csv`` reader that keep every cell as the text that is in the file; an empty one is None."""
    try:
        with fsspec.open(file, "rt", compression="infer", encoding="utf-8-sig", newline="") as stream:
            line = next(stream, "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}); save the table as CSV in UTF-8") from error
    rows = {separator: next(csv.reader([line], delimiter=separator), []) for separator in SEPARATORS}
    separator, names = max(rows.items(), key=lambda row: len(row[1]))  # the one that makes most columns
    columns = [name.strip() for name in names]
    if len(set(columns)) < len(columns):
        raise ValueError(f"{file} names a column twice in its first line: {', '.join(columns)}; rename one")
    return {
        "sep": separator,
        "column_names": columns,
        "header": 0,
        "features": Features({name: Value("string") for name in columns}),
        "keep_default_na": False,
        "na_values": [""],
        "skipinitialspace": True,
    }


def unite(pieces: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Join the pieces of each split; class ids are matched by name, ValueError where they cannot be."""
    columns = [column for parts in pieces.values() for piece in parts for column in piece.features.items()]
    for name in dict.fromkeys(name for name, feature in columns if isinstance(feature, ClassLabel)):
        pieces = _match(name, pieces)
    joined = {}
    for split, parts in pieces.items():
        features = parts[0].features
        if missing := set().union(*(set(features) ^ set(part.features) for part in parts)):
            raise ValueError(f"files of split {split!r} have different columns: not all of them have {sorted(missing)}")
        for name, feature in features.items():
            is_list = isinstance(getattr(feature, "feature", None), ClassLabel)
            if is_list and any(part.features[name] != feature for part in parts):
                problem = f"column {name!r}: files of split {split!r} number the classes of their lists differently"
                raise ValueError(f"{problem}; write all files with the same ClassLabel, or lists of text")
        parts = [part if part.features == features else part.cast(features) for part in parts]
        joined[split] = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    return joined


def _match(column: str, pieces: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Bring the ids of one column into one table of names, that of the training pieces."""
    tables = {
        split: [_names(part, column) for part in parts if column in part.features] for split, parts in pieces.items()
    }
    distinct = list(dict.fromkeys(table for parts in tables.values() for table in parts))
    if len(distinct) == 1:
        return {split: list(parts) for split, parts in pieces.items()}
    for table in distinct:
        if not table or table == tuple(str(number) for number in range(len(table))):
            others = [other for other in distinct if other != table]
            raise ValueError(
                f"column {column!r}: some files declare the classes {_listed(others[0])}, others have numbers without"
                f" names ({_listed(table)}), so they cannot be matched; write all files with the same ClassLabel"
            )
    reference = next(split for split in tables if tables[split])  # the training split where there is one
    names = _union(tables[reference])
    for split, parts in tables.items():
        theirs = _union(parts)
        if foreign := [name for name in theirs if name not in names]:
            raise ValueError(
                f"column {column!r}: split {split!r} declares the classes {_listed(theirs)}, and {reference!r}"
                f" {_listed(names)}, so {_listed(foreign)} cannot be matched; give the same class the same name"
            )
    rank_zero_info(f"column {column!r}: files number their classes differently; matched by name: {_listed(names)}")
    return {split: [_renumber(part, column, names) for part in parts] for split, parts in pieces.items()}


def _names(part: Any, column: str) -> tuple[str, ...]:
    """Names of a column's classes: declared, or those of its texts; none for numbers."""
    feature = part.features.get(column)
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    if isinstance(feature, Value) and "string" in feature.dtype:
        if not isinstance(part, Dataset):
            raise ValueError(
                f"column {column!r} holds text in some files and a ClassLabel in others, and a stream does not tell"
                " which texts will come; write all files with the same ClassLabel, or do not stream"
            )
        return tuple(sorted({cell.strip() for cell in part.unique(column) if cell is not None}))
    return ()


def _union(tables: Sequence[Sequence[str]]) -> list[str]:
    """The largest table where it has all the names, else all names, sorted."""
    largest = max(tables, key=len, default=())
    names = {name for table in tables for name in table}
    return list(largest) if names == set(largest) else sorted(names)


def _renumber(part: Any, column: str, names: Sequence[str]) -> Any:
    """Replace the ids or texts of a column, where a piece has it, by the ids of ``names``."""
    if column not in part.features:
        return part
    feature = part.features[column]
    ids: dict[Any, int | None] = {name: index for index, name in enumerate(names)}
    if isinstance(feature, ClassLabel):
        ids = {old: ids[name] for old, name in enumerate(feature.names)}
    ids |= {None: None, -1: -1}  # rows without a label
    target = ClassLabel(names=list(names))
    if isinstance(part, Dataset):
        new = [ids[cell.strip() if isinstance(cell, str) else cell] for cell in cells_of(part, column)]
        return part.remove_columns(column).add_column(column, new, feature=target).select_columns(part.column_names)
    features = {name: Image(decode=False) if isinstance(kind, Image) else kind for name, kind in part.features.items()}
    stored = part.cast(Features(features))  # pictures pass through as they are
    rename = functools.partial(_renumber_row, column=column, ids=ids)  # a worker takes no lambda
    return stored.map(rename, features=Features(features | {column: target}))


def _renumber_row(row: dict[str, Any], column: str, ids: Mapping[Any, int | None]) -> dict[str, Any]:
    return {column: ids[row[column]]}


def cells_of(data: Any, column: str) -> list[Any]:
    """The stored cells of one column of a map-style data set."""
    return list(data.select_columns([column])[:][column])


def _listed(names: Sequence[str]) -> str:
    return shorten(names, 10) or "integers"
