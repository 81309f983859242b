"""Pictures made smaller once, so that each epoch of each training decodes fewer pixels: ``swin-hf prepare``.

The result is a folder of parquet files with the same rows in the same order, with the same columns, classes and splits.
Only the pictures differ: those whose shorter side is longer than asked for are resized, as evaluation does it, and
stored upright as JPEG; all others are stored as they are, byte for byte.

Files are written under a hidden folder, which gets its name when all of them are there. So a training never sees a part
of the data, and a run that was killed goes on where it stopped.
"""

import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image as Pictures
from torch import Tensor

from swin_hf.files import replacing
from swin_hf.model.pixels import WHITE
from swin_hf.processing import Preprocessing, UnreadablePictureError, decode_pixels, picture_bytes
from swin_hf.ranges import SIDES, Options, choice, ranged

from .module import ImageDataModule, usable_cores
from .pictures import tolerated
from .reading import UNFINISHED, DataFiles, Reading, find_folder
from .sources import BOX_NAMES, Source, fingerprint, load_source
from .values import find_channels, find_white, look_at_pictures

RECORD, FILES = ".prepared.json", "data"
EMPTY = ".empty"  # files without a row, which ``datasets`` cannot read; they say which pictures were left out
UNREADABLE = b"swin_hf.unreadable"  # metadata of a file: a JSON list, a sentence for each picture left out
CHUNK = 64  # pictures that are held in memory at a time as they are stored
OnError = Literal["raise", "skip"]


@dataclass(frozen=True)
class Shrinking(Options):
    """How pictures are made smaller.

    Args:
        short_side: Length of the shorter side in pixels; a picture whose shorter side is not longer is kept as it is.
        quality: Of the JPEG files, as Pillow counts it.
        pictures_per_file: Rows of a parquet file; what a run that is killed has to do again, at most.
        on_error: What to do with an unreadable picture: raise, or skip, which leaves out its row and names it.
    """

    short_side: int = ranged(292, SIDES)  # 256 / 0.875: what evaluation at 256 pixels resizes to
    quality: int = ranged(95, "[1, 100]")
    pictures_per_file: int = ranged(2000, "[1, inf)")
    on_error: OnError = choice("raise", OnError)


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare` left."""

    folder: Path  # the data set
    pictures: dict[str, int]  # number of each split
    size: int  # bytes of all files
    unreadable: list[str]  # a sentence for each picture that could not be read, of all runs that wrote the data set


@dataclass(frozen=True)
class _Part:
    """The rows of one parquet file."""

    name: str
    split: str
    rows: range


def prepare(
    dataset: str,
    destination: str | os.PathLike[str],
    data_files: DataFiles | None = None,
    data_dir: str | None = None,
    reading: Reading = Reading(),
    shrinking: Shrinking = Shrinking(),
    watch: Any = None,
) -> Prepared:
    """Write a data set again with smaller pictures; called again after an interruption, it writes what is missing.

    Args:
        dataset: As of :class:`~swin_hf.training.ImageDataModule`, like data_files, data_dir and reading.
        destination: A new or an empty folder, or that of an interrupted run with the same options.
        data_files: Files of the data.
        data_dir: Their folder.
        reading: Only what names the data and the column of the pictures is used.
        shrinking: What becomes of the pictures.
        watch: Wraps the iterator over the pictures, given with their number: ``watch(pictures, total)``, for a bar.

    Raises:
        ValueError: If the destination holds something else.
        UnreadablePictureError: If a picture cannot be read, and such pictures are not skipped.
        WriteError: If the disk is full; what is written stays.
    """
    if reading.streaming:
        raise ValueError("a stream cannot be prepared, for its length is not known; leave reading.streaming out")
    ImageDataModule(dataset, data_files, data_dir, reading=reading)  # refuses what does not go together
    dataset = find_folder(dataset, data_files, data_dir, reading)
    source = load_source(dataset, data_files, data_dir, reading, None)
    base = os.path.abspath(os.path.join(dataset if os.path.isdir(dataset) else "", data_dir or ""))
    features = {split: _kept_features(source, split) for split in source.splits}
    parts = list(_parts(source, shrinking.pictures_per_file))
    folder, unfinished = Path(destination), Path(destination, UNFINISHED)
    _claim(folder, source, features, shrinking)
    if not (folder / FILES).is_dir():
        missing = [part for part in parts if _find(folder, part) is None]
        writer = _Writer(source, features, shrinking, base)
        pictures = itertools.chain.from_iterable(writer.write(part, folder) for part in missing)
        for _ in pictures if watch is None else watch(pictures, sum(len(part.rows) for part in missing)):
            pass
        if not unfinished.is_dir():
            raise ValueError(f"no picture of {dataset!r} can be read")
        unfinished.rename(folder / FILES)
    return _result(folder, parts)


def _kept_features(source: Source, split: str) -> Features:
    """The columns of the result: all but other pictures, masks among them, and boxes, which would no longer fit."""
    features = dict(source.splits[split].features) | {source.image_column: Image()}
    others = [name for name in features if name != source.image_column]
    if left_out := [name for name in others if name in BOX_NAMES or _holds_pictures(features[name])]:
        rank_zero_info(f"{split}: not kept, for they would not fit smaller pictures: columns {', '.join(left_out)}")
    return Features({name: feature for name, feature in features.items() if name not in left_out})


def _holds_pictures(feature: Any) -> bool:
    inner = feature.values() if isinstance(feature, dict) else filter(None, [getattr(feature, "feature", None)])
    return isinstance(feature, Image) or any(map(_holds_pictures, inner))


def _parts(source: Source, length: int) -> Iterator[_Part]:
    """The files of all splits, named as ``datasets`` names the shards of a split."""
    for split, data in source.splits.items():
        starts = range(0, len(data), length)
        for number, start in enumerate(starts):
            name = f"{split}-{number:05d}-of-{len(starts):05d}.parquet"
            yield _Part(name, split, range(start, min(start + length, len(data))))


def _claim(folder: Path, source: Source, features: dict[str, Features], shrinking: Shrinking) -> None:
    """Take a folder for a data set, or go on in it; ValueError if it holds something else."""
    plan = {  # what has to be the same in all runs that write one data set; files that are whole skipped nothing
        **{name: value for name, value in asdict(shrinking).items() if name != "on_error"},
        "source": fingerprint(source),
        "pictures": {split: len(data) for split, data in source.splits.items()},
        "columns": {split: {name: repr(kind) for name, kind in columns.items()} for split, columns in features.items()},
    }
    record = folder / RECORD
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else plan
    if different := [name for name, value in plan.items() if known.get(name) != value]:
        name = different[0]
        raise ValueError(
            f"{folder} was begun with {name} {known.get(name)}, and this command has {plan[name]}; go on with the"
            " same source and options, or give another folder"
        )
    if record.is_file():
        return
    others = [path.name for path in folder.iterdir() if path.suffix != ".partial"] if folder.is_dir() else []
    if others:
        raise ValueError(f"{folder} holds {min(others)}, and no earlier run began it; give a new or an empty folder")
    with replacing(record) as partial:
        partial.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


@dataclass(eq=False)
class _Writer:
    """Writes parquet files, on all cores: decoding, resizing and encoding release the interpreter."""

    source: Source
    features: dict[str, Features]
    shrinking: Shrinking
    base: str

    def __post_init__(self) -> None:
        looks, side = look_at_pictures(self.source), self.shrinking.short_side
        channels, self.grey_maximum = find_channels(looks, None), find_white(looks)
        if channels not in (1, 3):
            raise ValueError(
                f"{looks[0].name} has {channels} channels, and JPEG has 1 or 3; train on these pictures as they are"
            )
        self.smaller = Preprocessing((side, side), side, crop=False)

    def write(self, part: _Part, folder: Path) -> Iterator[int]:
        """Write one file whole, and yield each row that is done."""
        image, cells, unreadable = self.source.image_column, dict[int, dict[str, Any]](), list[str]()
        pictures: Any = self.source.splits[part.split].select_columns([image])
        with ThreadPoolExecutor(usable_cores()) as pool:
            for start in part.rows[::CHUNK]:
                rows = range(start, min(start + CHUNK, part.rows.stop))
                done = pool.map(self.cell, itertools.repeat(part.split), rows, pictures[rows.start : rows.stop][image])
                for row, cell in zip(rows, done, strict=True):
                    if isinstance(cell, UnreadablePictureError):
                        unreadable.append(str(cell))
                    else:
                        cells[row] = cell
                    yield row
        with replacing(folder / (UNFINISHED if cells else EMPTY) / part.name) as partial:
            pq.write_table(self.table(part.split, cells, unreadable), partial)

    def cell(self, split: str, row: int, cell: Any) -> dict[str, Any] | UnreadablePictureError:
        """The picture of a row as it is stored; the error where it cannot be read and such pictures are skipped."""
        root = self.source.roots.get(split)
        try:
            picture = decode_pixels(cell, 3, WHITE, root, self.grey_maximum)
        except UnreadablePictureError as error:
            return tolerated(error, f"{split} row {row}", self.shrinking.on_error, "--on-error skip")
        sides = picture.size if isinstance(picture, Pictures.Image) else picture.shape[1:]
        is_large = min(sides) > self.shrinking.short_side
        data = self.encode(picture) if is_large else picture_bytes(cell, root)
        return {"bytes": data, "path": _name(cell, self.base)}

    def encode(self, picture: Pictures.Image | Tensor) -> bytes:
        """A smaller picture as JPEG, in grey where it has no colour."""
        pixels = self.smaller.pixels(picture)
        is_grey = bool((pixels[:1] == pixels).all())
        stream = io.BytesIO()
        image = Pictures.fromarray(pixels[0].numpy() if is_grey else pixels.permute(1, 2, 0).numpy())
        image.save(stream, "JPEG", quality=self.shrinking.quality)
        return stream.getvalue()

    def table(self, split: str, cells: dict[int, dict[str, Any]], unreadable: list[str]) -> pa.Table:
        """The rows of a file, of which ``cells`` are the pictures, with their other columns as they are stored."""
        data: Any = self.source.splits[split]
        features, image = self.features[split], self.source.image_column
        schema = features.arrow_schema
        columns = {image: pa.array(list(cells.values()), schema.field(image).type)}
        if others := [name for name in features if name != image]:
            stored = data.select_columns(others).with_format("arrow")[list(cells)]
            columns |= {name: stored[name] for name in others}
        said = {UNREADABLE: json.dumps(unreadable)} if unreadable else {}
        table = pa.table({name: columns[name] for name in features}).cast(schema)
        return table.replace_schema_metadata({**schema.metadata, **said})


def _name(cell: Any, base: str) -> str | None:
    """What a picture is called: its path in the folder of the data, or the last part of a path from elsewhere."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    if not path:
        return None
    if "://" in path:
        return PurePosixPath(urlsplit(path).path).name
    if not os.path.isabs(path):
        return str(path)
    return Path(path).relative_to(base).as_posix() if Path(path).is_relative_to(base) else os.path.basename(path)


def _find(folder: Path, part: _Part) -> Path | None:
    """The file of some rows, if it is written."""
    paths = (folder / place / part.name for place in (UNFINISHED, FILES, EMPTY))
    return next((path for path in paths if path.is_file()), None)


def _result(folder: Path, parts: Iterable[_Part]) -> Prepared:
    """What the files of a finished data set say of themselves."""
    pictures: dict[str, int] = {}
    unreadable: list[str] = []
    size = 0
    for part in parts:
        path = _find(folder, part)
        if path is None:
            raise FileNotFoundError(f"{folder / FILES / part.name} is missing; prepare the data set in a new folder")
        header = pq.read_metadata(path)
        pictures[part.split] = pictures.get(part.split, 0) + header.num_rows
        unreadable += json.loads((header.metadata or {}).get(UNREADABLE, b"[]"))
        size += path.stat().st_size
    return Prepared(folder, pictures, size, unreadable)
