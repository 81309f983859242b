"""What the values of pictures are, found in samples of them: channels, white, mean and standard deviation."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from swin_hf.model.pixels import GREY_MAXIMUM, count_channels, least_white
from swin_hf.processing import open_picture

from .pictures import PictureDataset, picture_name
from .sources import Source

STATISTICS_SAMPLE = 1024  # training pictures behind mean="dataset"
SAMPLE, FAR_SAMPLE = 128, 8  # pictures that are looked at first: at hand; in a stream or behind addresses
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners store in 16


class Look(NamedTuple):
    """What a picture of a sample says without being decoded."""

    name: str
    channels: int  # all that its file holds
    unread: int  # those of them in bands and pages that reading it as RGB does not look at
    is_array: bool  # whether it is a .npy file
    white: int | None  # see swin_hf.model.pixels.least_white


def look_at_pictures(source: Source) -> list[Look]:
    """A sample of the training pictures, evenly spaced, or of another split where there is none."""
    split, root = source.reference, source.roots.get(source.reference)
    data = source.splits[split].select_columns([source.image_column])
    rows: Iterable[tuple[int, Any]] = enumerate(itertools.islice(data, FAR_SAMPLE))
    if isinstance(data, Dataset):
        far = "://" in str((data[0][source.image_column] or {}).get("path")) if len(data) else False
        number = min(len(data), FAR_SAMPLE if far else SAMPLE)
        rows = ((place, data[place]) for place in np.linspace(0, len(data) - 1, num=number, dtype=int).tolist())
    looks = []
    for place, row in rows:
        cell = row[source.image_column]
        try:
            with open_picture(cell, root) as picture:
                count, is_array = count_channels(picture), isinstance(picture, np.ndarray)
                unread = 0 if isinstance(picture, np.ndarray) else count - len(picture.getbands())
                name = picture_name(cell, root, f"{split} row {place}")
                looks.append(Look(name, count, unread, is_array, least_white(picture)))
        except Exception:  # said when it is read
            continue
    return looks


def find_channels(looks: Sequence[Look], wanted: int | None) -> int:
    """The number of channels of the pictures: the one that is asked for, or that of arrays (``.npy``); 3 for others.

    ValueError if pictures of the sample have another number than that, or than each other.
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
        numbers = f"{other[1].name} has {other[0]}, and {one[1].name} {one[0]}"
        raise ValueError(f"all pictures have the same number of channels (data.num_channels): {numbers}")
    return next(iter(first))


def find_white(looks: Sequence[Look]) -> int:
    """White of the grey pictures of 16 bits: a camera of 12 bits fills no more than 0..4095 of 0..65535.

    Of a sample, the largest value decides how many bits are used; 65535 where there are no such pictures.
    """
    largest = max((look.white for look in looks if look.white is not None), default=0)
    bits = next((depth for depth in DEPTHS if 0 < largest < 2**depth), 16)
    if bits < 16:
        rank_zero_warn(
            f"the 16-bit pictures among {len(looks)} reach {largest} of {GREY_MAXIMUM}: they seem to hold {bits} bits, "
            f"so {2**bits - 1} is taken as white in all; if they are only dark, give pixels.grey_maximum {GREY_MAXIMUM}"
        )
    return int(2**bits - 1)


def channel_statistics(data: PictureDataset, num_channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of evenly spaced pictures; ValueError if its values are all equal."""
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
    means, stds = ([float(format(value, digits)) for value in values.tolist()] for values in (mean, std))
    rank_zero_info(f"of {len(places):,} training pictures: mean {means}, standard deviation {stds}")
    return means, stds
