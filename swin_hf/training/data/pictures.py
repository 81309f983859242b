"""From stored pictures to batches: decoding, transforms with random numbers of their own, unreadable files."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
import torch
import torch.utils.data
from datasets import Dataset, IterableDataset

from swin_hf.processing import UnreadablePictureError

from . import sampling, sources
from .reading import OnError

Batch = dict[str, Any]

REPLACEMENTS = 50  # pictures tried in place of an unreadable one before giving up


@dataclass(eq=False)
class PictureReader:
    """From the stored cells of a row to a sample; a plain object that travels to loader workers.

    A task whose targets are not one number for each picture has a subclass: :attr:`columns` are the cells that it
    reads, and :meth:`sample` makes its targets of them, transformed together with the picture.
    """

    source: InitVar[sources.Source]
    split: str  # the stored one
    transform: Callable[..., Any]  # to (C, H, W) of uint8, or float32 of other than 1 or 3 channels
    decode: Callable[..., Any]  # from a stored cell, and the root of relative paths, to a picture
    on_error: OnError

    def __post_init__(self, source: sources.Source) -> None:
        self.image_column, self.root = source.image_column, source.roots.get(self.split)

    def name(self, cells: Mapping[str, Any], row: Any) -> str:
        """What a picture is called: its path, or its row where it has none."""
        return picture_name(cells[self.image_column], self.root, f"{self.split} row {row}")

    @property
    def columns(self) -> list[str]:
        """The columns whose cells :meth:`sample` needs."""
        return [self.image_column]

    def sample(self, picture: Any, cells: Mapping[str, Any]) -> Batch:
        """The sample of a decoded picture and the cells of its row, without its class.

        ``pixel_values`` are ``(C, H, W)``; UnreadablePictureError if the targets cannot be read.
        """
        return {"pixel_values": self.transform(picture)}

    def read(self, cells: Mapping[str, Any], seed: int, row: Any) -> Batch | UnreadablePictureError:
        """Decode and transform one picture with random numbers of its own; the caller's are left as they were."""
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 100 times as much: it looks for GPUs
        try:
            return self.sample(self.decode(cells[self.image_column], root=self.root), cells)
        except UnreadablePictureError as error:
            option = "--data.reading.on_error skip (or replace)"
            return tolerated(error, f"{self.split} row {row}", self.on_error, option)
        finally:
            torch.set_rng_state(state)


@dataclass(eq=False)
class PictureDataset(torch.utils.data.Dataset[Any]):
    """The rows of a split as batches; asked for by row number, or by ``(epoch, row)`` when training.

    A third number is how often balanced sampling has drawn the row in the epoch before.
    """

    data: Dataset  # with undecoded pictures
    rows: np.ndarray[Any, Any]  # row of the data behind each index
    labels: np.ndarray[Any, Any] | None  # class id, or numbers, of each index
    reader: PictureReader
    seed: int  # of the augmentation
    training: bool  # whether an unreadable picture may be replaced by another
    named: bool = False  # whether a sample says under "sources" which row it is, and what it is called

    def __post_init__(self) -> None:
        self.data = self.data.select_columns(self.reader.columns)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, ...]) -> Batch:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, ...]]) -> list[Batch]:
        """Read a whole batch in one access; called by torch's fetcher."""
        started = time.perf_counter()
        asked = [key if isinstance(key, tuple) else (0, key) for key in keys]
        table = self.data[[int(self.rows[index]) for _, index, *_ in asked]]
        cells = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        samples = [self._sample(row, *key) for key, row in zip(asked, cells, strict=True)]
        if self.training and not any("pixel_values" in sample for sample in samples):
            samples.append(self._replacement(*asked[0][:2]))  # a batch must not be empty: the other ranks wait for it
        if self.training:
            samples[0]["seconds"] = time.perf_counter() - started
        return samples

    def _sample(self, cells: Mapping[str, Any], epoch: int, index: int, draw: int = 0) -> Batch:
        row = int(self.rows[index])
        place = ("sample", epoch, row) if draw == 0 else ("draw", epoch, row, draw)
        read = self.reader.read(cells, sampling.derive_seed(self.seed, *place), row)
        if not isinstance(read, UnreadablePictureError):
            name = {"sources": (row, self.reader.name(cells, row))} if self.named else {}
            return self._labelled(read, index) | name
        sample: Batch = {"unreadable": str(read)}
        if self.reader.on_error == "replace" and self.training:
            sample |= self._replacement(epoch, index)
        return sample

    def _replacement(self, epoch: int, index: int) -> Batch:
        generator = np.random.default_rng(sampling.derive_seed(self.seed, "replacement", epoch, int(self.rows[index])))
        for other in generator.integers(len(self), size=REPLACEMENTS):
            row = int(self.rows[other])
            seed = sampling.derive_seed(self.seed, "sample", epoch, row, index)
            read = self.reader.read(self.data[row], seed, row)
            if not isinstance(read, UnreadablePictureError):
                return self._labelled(read, int(other))
        raise UnreadablePictureError(
            f"{self.reader.split} row {int(self.rows[index])} and {REPLACEMENTS} pictures tried in its place are all"
            " unreadable; check the files of the dataset"
        )

    def _labelled(self, sample: Batch, index: int) -> Batch:
        return sample if self.labels is None else sample | {"labels": self.labels[index]}


@dataclass(eq=False)
class PictureStream(torch.utils.data.IterableDataset[Any]):
    """A stream as samples. An unreadable picture leaves its place in the batch empty, whatever the policy."""

    data: IterableDataset  # this rank's share of the stream, endless when training
    target: Callable[..., Any] | None  # of the cells of a row
    reader: PictureReader
    seed: int  # of the augmentation
    rank: int
    batch_size: int  # to count batches that need not be decoded
    named: bool = False  # as for a PictureDataset
    epoch: int = 0
    done: int = 0  # batches of the epoch that have been trained on
    timed: bool = False  # whether it is trained on

    def set_position(self, epoch: int, done: int) -> None:
        """Choose the epoch's order, and how many batches are only counted because they have been trained on."""
        self.data.set_epoch(epoch)
        self.epoch, self.done, self.timed = epoch, done, True

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        counted = self.batch_size * len(range(number, self.done, workers))
        started = time.perf_counter()
        for place, cells in enumerate(self.data):
            if place < counted:
                yield {}
                continue
            seed = sampling.derive_seed(self.seed, "stream", self.rank, number, self.epoch, place)
            read = self.reader.read(cells, seed, place)
            if isinstance(read, UnreadablePictureError):
                yield {"unreadable": str(read)}
                continue
            if self.target is not None:
                read["labels"] = self.target(cells)
            if self.named:
                read["sources"] = (place, self.reader.name(cells, place))
            if self.timed:
                read["seconds"] = time.perf_counter() - started
            yield read
            started = time.perf_counter()


def collate(samples: Sequence[Batch]) -> Batch:
    """Stack samples into ``{"pixel_values": (B, C, H, W), "labels": (B, ...)}``.

    Unreadable pictures are left out and named under ``unreadable``; where none can be read, that is all there is. Row
    and name of the others are under ``sources``, where they have them. ``seconds`` is what a training batch took.
    """
    readable = [sample for sample in samples if "pixel_values" in sample]
    # Without any, all are unreadable, or counted and not decoded: see PictureStream.
    batch: Batch = {
        name: torch.stack([torch.as_tensor(sample[name]) for sample in readable])
        for name in ("pixel_values", "labels")
        if readable and name in readable[0]
    }
    for name in ("unreadable", "sources"):
        if found := [sample[name] for sample in samples if name in sample]:
            batch[name] = found
    if seconds := sum(sample.get("seconds", 0.0) for sample in samples):
        batch["seconds"] = seconds
    return batch


def tolerated(error: UnreadablePictureError, place: str, on_error: str, option: str) -> UnreadablePictureError:
    """The error with the place of its picture; raised if the policy is ``raise``, which the ``option`` changes."""
    if on_error == "raise":
        raise UnreadablePictureError(f"{place}: {error}; repair or remove the file, or pass {option}") from error
    return UnreadablePictureError(f"{place}: {error}")


def picture_name(cell: Any, root: str | None, otherwise: str) -> str:
    """What a picture is called: its path, or something else where it has none."""
    path = (cell or {}).get("path")
    if not path:
        return otherwise
    is_file = cell.get("bytes") is None and "://" not in path
    return os.path.join(root or "", path) if is_file else str(path)
