"""From stored pictures to batches: decoding, transforms with random numbers of their own, unreadable files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils.data
from datasets import Dataset, IterableDataset
from lightning.pytorch.utilities import rank_zero_warn

from swin_hf.model.pixels import GREY_MAXIMUM, count_channels, least_white
from swin_hf.processing import UnreadablePictureError, decode_picture, open_picture

from . import sampling, sources
from .reading import OnError

Batch = dict[str, Any]

STATISTICS_SAMPLE = 1024  # training pictures behind mean="dataset"
SAMPLE, FAR_SAMPLE = 128, 8  # pictures that are looked at first: at hand; in a stream or behind addresses
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners store in 16
REPLACEMENTS = 50  # pictures tried in place of an unreadable one before giving up


class PictureReader:
    """From the stored cells of a row to a sample; a plain object that travels to loader workers.

    A task whose targets are not one number for each picture has a subclass: :attr:`columns` are the cells that it
    reads, and :meth:`sample` makes its targets of them, transformed together with the picture.

    Args:
        source: Where pictures and labels are.
        split: Name of the stored split.
        transform: From a decoded picture to ``(C, H, W)`` of ``uint8``, or float32 of other than 1 or 3 channels.
        num_channels: How many a picture has.
        background: Colour behind transparent pixels.
        on_error: What to do with a picture that cannot be decoded.
        grey_maximum: Value that is white in grey pictures of 16 bits.
    """

    def __init__(
        self,
        source: sources.Source,
        split: str,
        transform: Callable[..., Any],
        num_channels: int,
        background: Sequence[int],
        on_error: OnError,
        grey_maximum: int = GREY_MAXIMUM,
    ) -> None:
        self.image_column, self.root = source.image_column, source.roots.get(split)
        self.split, self.transform = split, transform
        self.num_channels, self.background, self.on_error = num_channels, tuple(background), on_error
        self.grey_maximum = grey_maximum

    def name(self, cells: Mapping[str, Any], row: Any) -> str:
        """What a picture is called: its path, or its row where it has none."""
        return picture_name(cells[self.image_column], self.root, f"{self.split} row {row}")

    @property
    def columns(self) -> list[str]:
        """The columns whose cells :meth:`sample` needs."""
        return [self.image_column]

    def sample(self, picture: Any, cells: Mapping[str, Any]) -> Batch:
        """The sample of a decoded picture, without its class: ``pixel_values`` are ``(C, H, W)``.

        Args:
            picture: What :func:`~swin_hf.processing.decode_picture` returns.
            cells: The stored cells of its row.
        """
        return {"pixel_values": self.transform(picture)}

    def read(self, cells: Mapping[str, Any], seed: int, row: Any) -> Batch | UnreadablePictureError:
        """Decode and transform one picture with random numbers of its own.

        Args:
            cells: Stored cells of its row.
            seed: Seed of the augmentation; the caller's random stream is left as it was.
            row: Row number, for the message.

        Returns:
            The sample, or the error when the policy is to go on.

        Raises:
            UnreadablePictureError: If the policy is ``raise``.
        """
        cell = cells[self.image_column]
        try:
            picture = decode_picture(cell, self.num_channels, self.background, self.root, self.grey_maximum)
        except UnreadablePictureError as error:
            message = f"{self.split} row {row}: {error}"
            if self.on_error == "raise":
                raise UnreadablePictureError(
                    f"{message}; repair or remove the file, or pass --data.reading.on_error skip (or replace)"
                ) from error
            return UnreadablePictureError(message)
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 100 times as much: it looks for GPUs
        try:
            return self.sample(picture, cells)
        finally:
            torch.set_rng_state(state)


class PictureDataset(torch.utils.data.Dataset[Any]):
    """The rows of a split as batches; asked for by row number, or by ``(epoch, row)`` when training.

    A third number is how often balanced sampling has drawn the row in the epoch before.

    Args:
        data: Split with undecoded pictures.
        rows: Row of ``data`` behind each index.
        labels: Class id, or numbers, of each index; None without labels.
        reader: Decoder and transform.
        seed: Seed of the augmentation.
        training: Whether an unreadable picture may be replaced by another.
        named: Whether a sample says under ``sources`` which row it is, and what it is called.
    """

    def __init__(
        self,
        data: Dataset,
        rows: np.ndarray[Any, Any],
        labels: np.ndarray[Any, Any] | None,
        reader: PictureReader,
        seed: int,
        training: bool,
        named: bool = False,
    ) -> None:
        self.named = named
        self.data = data.select_columns(reader.columns)
        self.rows, self.labels, self.reader, self.seed, self.training = rows, labels, reader, seed, training

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, ...]) -> Batch:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, ...]]) -> list[Batch]:
        """Read a whole batch in one access; called by torch's fetcher."""
        asked = [key if isinstance(key, tuple) else (0, key) for key in keys]
        table = self.data[[int(self.rows[index]) for _, index, *_ in asked]]
        samples = []
        for place, (epoch, index, *draw) in enumerate(asked):
            samples.append(self._sample(epoch, index, {name: cells[place] for name, cells in table.items()}, *draw))
        if self.training and all("pixel_values" not in sample for sample in samples):
            samples.append(self._replacement(*asked[0][:2]))  # a batch must not be empty: the other ranks wait for it
        return samples

    def _sample(self, epoch: int, index: int, cells: Mapping[str, Any], draw: int = 0) -> Batch:
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
        if self.labels is None:
            return sample
        row = {} if self.training else {"rows": int(self.rows[index])}
        return sample | row | {"labels": self.labels[index]}

    def file_name(self, row: int) -> str:
        """Name of the picture file of a row of the data, without its folder; the number of the row if it has none."""
        cell = self.data[row][self.reader.image_column]
        path = cell.get("path") if isinstance(cell, Mapping) else cell if isinstance(cell, str) else None
        return os.path.basename(path) if path else f"row {row}"


class PictureStream(torch.utils.data.IterableDataset[Any]):
    """A stream as samples. An unreadable picture leaves its place in the batch empty, whatever the policy.

    Args:
        data: This rank's share of the stream, endless when training.
        source: For class ids.
        reader: Decoder and transform.
        seed: Seed of the augmentation.
        rank: This process.
        batch_size: Samples per batch, to count batches that need not be decoded.
        named: As for :class:`PictureDataset`.
    """

    def __init__(
        self,
        data: IterableDataset,
        source: sources.Source,
        reader: PictureReader,
        seed: int,
        rank: int,
        batch_size: int,
        named: bool = False,
    ) -> None:
        self.data, self.reader, self.seed, self.rank, self.batch_size = data, reader, seed, rank, batch_size
        self.target = source.target if source.label_columns else None
        self.named = named
        self.epoch = self.done = 0

    def set_position(self, epoch: int, done: int) -> None:
        """Choose the epoch's order, and how many batches are only counted because they have been trained on."""
        self.data.set_epoch(epoch)
        self.epoch, self.done = epoch, done

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        counted = self.batch_size * len(range(number, self.done, workers))
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
            yield read


def collate(samples: Sequence[Batch]) -> Batch:
    """Stack samples into ``{"pixel_values": (B, C, H, W), "labels": (B, ...)}``.

    Evaluation has the numbers of the rows too, ``rows`` ``(B,)``.

    Unreadable pictures are left out and named under ``unreadable``, for the main process to count. When none can be
    read, that is all there is in the batch. Row and name of the others are listed under ``sources``, where they have
    them.
    """
    unreadable = [sample["unreadable"] for sample in samples if "unreadable" in sample]
    readable = [sample for sample in samples if "pixel_values" in sample]
    # Without any, all are unreadable, or counted and not decoded: see PictureStream.
    batch: Batch = {
        name: torch.stack([torch.as_tensor(sample[name]) for sample in readable])
        for name in ("pixel_values", "labels", "rows")
        if readable and name in readable[0]
    }
    if unreadable:
        batch["unreadable"] = unreadable
    if any("sources" in sample for sample in readable):
        batch["sources"] = [sample["sources"] for sample in readable]
    return batch


def channel_statistics(data: PictureDataset, num_channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, for values in 0..1, of evenly spaced pictures.

    Raises:
        ValueError: If all values of a channel are equal.
    """
    places = np.linspace(0, len(data) - 1, num=min(STATISTICS_SAMPLE, len(data)), dtype=int)
    total, squares = torch.zeros(2, num_channels, dtype=torch.float64)
    count, digits, least = 0, ".4f", 1e-3
    for place in places:
        pixels = data[int(place)].get("pixel_values")
        if pixels is not None:
            values = pixels.flatten(1).double() / 255
            total, squares, count = total + values.sum(1), squares + (values**2).sum(1), count + values.shape[1]
            if pixels.dtype != torch.uint8:  # in a unit of their own
                digits, least = ".6g", 0.0
    mean = total / max(1, count)
    std = (squares / max(1, count) - mean**2).clamp(min=0).sqrt()
    same = torch.nonzero(std <= torch.maximum(1e-6 * mean.abs(), torch.tensor(least)))[:, 0].tolist()
    if same:
        raise ValueError(
            f"the training pictures are of one colour: channel {same[0]}, counted from 0, is {mean[same[0]]:.6g} with a"
            f" standard deviation of {std[same[0]]:.6g}; leave it out, or give pixels.mean and pixels.std"
        )
    return [float(format(value, digits)) for value in mean.tolist()], [float(format(v, digits)) for v in std.tolist()]


def picture_name(cell: Any, root: str | None, otherwise: str) -> str:
    """What a picture is called: its path, or something else where it has none."""
    path = (cell or {}).get("path")
    if not path:
        return otherwise
    is_file = cell.get("bytes") is None and "://" not in path
    return os.path.join(root or "", path) if is_file else str(path)


class Look(NamedTuple):
    """What a picture of a sample says without being decoded.

    Attributes:
        name: What it is called.
        channels: All that its file holds.
        unread: Those of them in bands and pages that reading it as RGB does not look at.
        is_array: Whether it is a ``.npy`` file.
        white: See :func:`~swin_hf.model.pixels.least_white`.
    """

    name: str
    channels: int
    unread: int
    is_array: bool
    white: int | None


def look_at_pictures(source: sources.Source) -> list[Look]:
    """A sample of the training pictures, evenly spaced, or of another split where there is none."""
    split = source.reference
    data = source.splits[split].select_columns([source.image_column])
    if isinstance(data, Dataset):
        far = "://" in str((data[0][source.image_column] or {}).get("path")) if len(data) else False
        number = min(len(data), FAR_SAMPLE if far else SAMPLE)
        places: Iterable[int] = np.linspace(0, len(data) - 1, num=number, dtype=int).tolist()
        rows: Iterable[Any] = (data[place] for place in places)
    else:
        places, rows = range(FAR_SAMPLE), itertools.islice(data, FAR_SAMPLE)
    looks = []
    for place, row in zip(places, rows, strict=False):
        cell, root = row[source.image_column], source.roots.get(split)
        try:
            with open_picture(cell, root) as picture:
                is_array, count = isinstance(picture, np.ndarray), count_channels(picture)
                unread = 0 if isinstance(picture, np.ndarray) else count - len(picture.getbands())
                name = picture_name(cell, root, f"{split} row {place}")
                looks.append(Look(name, count, unread, is_array, least_white(picture)))
        except Exception:  # said when it is read
            continue
    return looks


def find_channels(looks: Sequence[Look], wanted: int | None) -> int:
    """The number of channels of the pictures: the one that is asked for, or that of arrays (``.npy``); 3 for others.

    Raises:
        ValueError: If pictures of a sample have another number than that, or than each other.
    """
    if wanted in (1, 3):
        return wanted
    first: dict[int, Look] = {}
    for look in looks:
        first.setdefault(look.channels if look.is_array or wanted is not None else 3, look)
    if wanted is None and first.keys() <= {1, 3}:
        deep = next((look for look in looks if look.unread), None)
        if deep is not None:
            rank_zero_warn(
                f"{deep.name} holds {deep.channels} channels in its bands and pages, and {deep.unread} of them are not "
                f"read; to train on all, give data.num_channels {deep.channels}"
            )
        return max(first, default=3)
    if wanted is not None:
        first = {wanted: first.pop(wanted, Look("num_channels is", wanted, 0, True, None)), **first}
    if len(first) > 1:
        (one, other), *_ = itertools.combinations(first.items(), 2)
        raise ValueError(
            f"all pictures have the same number of channels (data.num_channels): {other[1].name} has {other[0]}, and "
            f"{one[1].name} {one[0]}"
        )
    return next(iter(first))


def find_white(looks: Sequence[Look]) -> int:
    """White of the grey pictures of 16 bits: a camera of 12 bits fills no more than 0..4095 of 0..65535.

    Of a sample, the largest value decides how many bits are used; all pictures are then scaled alike.

    Returns:
        255, 1023, 4095, 16383 or 65535; the last also where there are no such pictures.
    """
    largest = max((look.white for look in looks if look.white is not None), default=0)
    bits = next((depth for depth in DEPTHS if 0 < largest < 2**depth), 16)
    if bits < 16:
        rank_zero_warn(
            f"the 16-bit pictures among {len(looks)} reach {largest} of {GREY_MAXIMUM}: they seem to hold {bits} bits, "
            f"so {2**bits - 1} is taken as white in all; if they are only dark, give pixels.grey_maximum {GREY_MAXIMUM}"
        )
    return int(2**bits - 1)
