"""Pictures with a class for each pixel: where masks are found, how they are read, and how both are augmented.

A mask is a picture of class numbers: 8 or 16 bits of grey, a palette whose indices are the classes, or an array. It is
never resampled with anything but nearest.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, Features, Image
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from swin_hf.folders import SPLIT_NAMES, list_pictures, metadata_files, split_of
from swin_hf.processing import (
    Interpolation,
    Preprocessing,
    UnreadablePictureError,
    decode_picture,
    open_picture,
    resampling_of,
    to_tensor,
)
from swin_hf.ranges import Options, ranged

from ..options import plain
from .module import ImageDataModule
from .pictures import Batch, PictureReader
from .reading import DataFiles, Reading, check_class_names, find_folder, picture_folder, read
from .shards import shorten
from .sources import IMAGE_NAMES, UNLABELLED, Source, find_column, find_roots, is_text
from .splits import Splits
from .transforms import Pixels

MASK_NAMES = ("annotation", "mask", "label", "labels", "segmentation", "segmentation_mask", "semantic_mask", "target")
IMAGE_FOLDERS = ("images", "image", "img", "imgs", "JPEGImages")
MASK_FOLDERS = ("masks", "mask", "annotations", "labels", "SegmentationClass")
LONG_SIDES = 4  # the longest side that a resize leaves, in short sides: (2048, 512) in OpenMMLab's recipe
CROPS = 10  # drawn while one class fills too much of them


@dataclass(frozen=True)
class Masks(Options):
    """What the values of a mask mean.

    Args:
        column: Column of the masks of a table; found by its name (annotation, mask, label, ...) if not given.
        reduce_labels: Whether 0 means "no class" and the classes count from 1, as in ADE20K.
        ignore_index: Value of pixels without a class.
        class_names: Names of the classes, or their number; from classes.txt (a name a line) or id2label.json in the
            folder of the data if not given.
    """

    column: str | None = None
    reduce_labels: bool = False
    ignore_index: int = ranged(255, "[0, 65535]")
    class_names: list[str] | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_class_names("masks.class_names", self.class_names, "[1, 65535]")


@dataclass(frozen=True)
class JointAugmentation(Options):
    """How a training picture and its mask are changed at random; the defaults are OpenMMLab's for ADE20K.

    Args:
        scale: Least and greatest factor on the short side before the crop; the short side is that of the crop.
        largest_class: A crop is drawn again, up to ten times, while one class fills more of it.
        hflip: Probability of a horizontal flip.
        distort: Probability of each change of brightness, contrast, saturation and hue, of pictures of 3 channels.
    """

    scale: tuple[float, float] = ranged((0.5, 2.0), "(0, 16]", ascending=True)
    largest_class: float = ranged(0.75, "(0, 1]")
    hflip: float = ranged(0.5, "[0, 1]")
    distort: float = ranged(0.5, "[0, 1]")
    erasing: ClassVar[float] = 0.0  # nothing of a picture is erased
    group: ClassVar[str] = "augmentation"

    def facts(self) -> dict[str, Any]:
        """What a card says of it."""
        return {f"joint_{name}": value for name, value in plain(self).items()}


class SegmentationDataModule(ImageDataModule):
    """Training, validation and test batches of pictures with a mask each.

    Training batches are ``{"pixel_values": (B, C, H, W), "labels": (B, H, W)}`` of crops. Evaluation takes a picture at
    a time, its short side that of ``image_size`` and the proportions kept, with the labels ``(1, height, width)`` of
    the picture as it is stored. The other arguments are those of :class:`ImageDataModule`.

    Args:
        dataset: A folder with ``images/`` and ``masks/`` (in it, or in a folder for each split), where files of one
            name belong together; or whatever :class:`ImageDataModule` takes, with a column of masks.
        image_size: Height and width of the training crops in pixels, or one number for both.
        masks: What the values of a mask mean.
        augmentation: How a picture and its mask are changed at random.
        pixels: What the values of a picture mean.
    """

    colour_options: ClassVar[dict[str, Any]] = {"distort": 0.0}

    def __init__(
        self,
        dataset: str = "parquet",
        data_files: DataFiles | None = None,
        data_dir: str | None = None,
        image_size: int | tuple[int, int] = 512,
        num_channels: int | None = None,
        batch_size: int = 8,
        num_workers: int | None = None,
        reading: Reading = Reading(),
        splits: Splits = Splits(),
        masks: Masks = Masks(),
        augmentation: JointAugmentation = JointAugmentation(),
        pixels: Pixels = Pixels(interpolation="bilinear"),
    ) -> None:
        super().__init__(
            dataset, data_files, data_dir, image_size, num_channels, batch_size, eval_batch_size=1,
            num_workers=num_workers, reading=replace(reading, labelled=False), splits=splits, pixels=pixels,
        )  # fmt: skip
        self.masks, self.augmentation = masks, augmentation
        self.mask_column = ""
        self.ignore_index = masks.ignore_index  # label of pixels without a class in batches: that of the module

    def find_source(self) -> Source:
        """Read pairs of pictures and masks, and the names of the classes; ValueError if they cannot be found."""
        dataset = find_folder(self.dataset, self.data_files, self.data_dir, self.reading)
        folder = picture_folder(dataset, self.data_files, self.data_dir)
        splits = {} if folder is None else read_pairs(folder)
        if splits and self.reading.streaming:
            splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
        if not splits and (folder is None or metadata_files(folder)):
            splits, _ = read(dataset, self.data_files, self.data_dir, self.reading)
        if not splits:
            raise ValueError(
                f"{folder} holds pictures and no masks; put them into {IMAGE_FOLDERS[0]}/ and {MASK_FOLDERS[0]}/, "
                "under the same names, in it or in a folder for each split (train/, val/, test/)"
            )
        features = next(iter(splits.values())).features
        image, self.mask_column = find_columns(features, self.reading.image_column, self.masks.column)
        for column in (image, self.mask_column):
            splits = {name: split.cast_column(column, Image(decode=False)) for name, split in splits.items()}
        source = Source(splits, image)
        if folder is None:  # whose paths start from the working directory
            find_roots(source, dataset, self.data_files, self.data_dir)
        names = self.masks.class_names
        if isinstance(names, int):
            names = [str(number) for number in range(names)]
        source.class_names = names or read_class_names(folder or source.roots.get(source.reference) or dataset)
        return source

    @property
    def preprocessing(self) -> Preprocessing:
        """The short side is brought to that of ``image_size``; nothing is cut off."""
        return replace(super().preprocessing, short_side=min(self.image_size), crop=False)

    def announce(self) -> None:
        """Say what was found."""
        names = self.load().class_names
        sizes = ", ".join(f"{name} {size:,}" for name, size in self.split_sizes.items())
        rank_zero_info(f"{len(names)} classes: {shorten(names)}\npictures with a mask: {sizes}")

    def reader(self, split: str, transform: Callable[..., Any]) -> PictureReader:
        """How a picture and its mask become a sample."""
        decode, on_error = self.decoder(decode_picture), self.reading.on_error
        source, ignored = self.load(), self.ignore_index
        return PairReader(source, split, transform, decode, on_error, self.mask_column, self.masks, ignored)

    def train_transform(self) -> Callable[..., Any]:
        """Resize, crop, flip and distort both at random."""
        self.load()  # for mean="dataset"
        fill = [255 * float(value) for value in self.mean]
        return JointTransform(self.image_size, self.augmentation, self.pixels.interpolation, fill, self.ignore_index)

    def eval_transform(self) -> Callable[..., Any]:
        """Resize the picture; the mask stays as it is stored."""
        return partial(whole_picture, self.preprocessing)


@dataclass(eq=False)
class PairReader(PictureReader):
    """Reads a picture and its mask, and transforms both together; the transform takes its labels ``(H, W)`` too."""

    column: str  # of the masks
    masks: Masks
    ignore_index: int  # label of pixels without a class in a sample

    def __post_init__(self, source: Source) -> None:
        super().__post_init__(source)
        numbers = source.encode or {}  # those of a model that is measured
        self.order = [numbers[number] for number in sorted(numbers) if number != UNLABELLED]
        self.num_classes = len(self.order or source.class_names)

    @property
    def columns(self) -> list[str]:
        """The columns of pictures and masks."""
        return [self.image_column, self.column]

    def sample(self, picture: Any, cells: Mapping[str, Any]) -> Batch:
        """``pixel_values`` ``(C, H, W)`` and ``labels`` ``(H, W)`` of ``int64``."""
        labels = read_mask(cells[self.column], self.masks, self.num_classes, self.root)
        name = (cells[self.column] or {}).get("path") or "a mask"
        height, width = tvf.get_size(picture)
        if labels.shape != (height, width):
            sizes = f"{labels.shape[1]}x{labels.shape[0]} pixels and its picture {width}x{height}"
            raise UnreadablePictureError(f"{name} has {sizes}; a mask has the size of its picture")
        if self.order or self.ignore_index != self.masks.ignore_index:
            table = torch.arange(max(self.masks.ignore_index, self.num_classes) + 1)
            table[: len(self.order)] = torch.tensor(self.order)
            table[self.masks.ignore_index] = self.ignore_index
            labels = table[labels]
        pixels, labels = self.transform(picture, labels)
        return {"pixel_values": pixels, "labels": labels}


def read_mask(cell: Any, masks: Masks, num_classes: int, root: str | None = None) -> Tensor:
    """Class number of each pixel of a stored mask, ``(H, W)`` int64; UnreadablePictureError if it has none."""
    name = (cell or {}).get("path") or "a mask"
    try:
        with open_picture(cell, root) as picture:
            kind, values = getattr(picture, "mode", ""), np.array(picture)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise UnreadablePictureError(f"{name}: {type(error).__name__}: {error}") from error
    if values.ndim != 2 or values.dtype.kind not in "bui":
        what = f"a picture of mode {kind}" if kind else f"an array of shape {values.shape} and type {values.dtype}"
        raise UnreadablePictureError(
            f"{name} is {what}; a mask holds one class number for each pixel: grey of 8 or 16 bits, a palette, or a "
            ".npy file of whole numbers"
        )
    labels = torch.from_numpy(values.astype(np.int64))
    if masks.reduce_labels:
        labels = torch.where((labels == 0) | (labels == masks.ignore_index), masks.ignore_index + 1, labels) - 1
    known = labels[labels != masks.ignore_index]
    if len(known) and (int(known.max()) >= num_classes or int(known.min()) < 0):
        wrong = int(known.max()) + masks.reduce_labels
        raise UnreadablePictureError(
            f"{name} holds the number {wrong}, and there are {num_classes} classes; name all classes (masks."
            "class_names), or say which number has none (masks.ignore_index)"
        )
    return labels


@dataclass(eq=False)
class JointTransform:
    """Resize, crop, flip and distort a picture and its labels at random, for training."""

    size: tuple[int, int]  # height and width of the crop in pixels
    options: JointAugmentation
    interpolation: Interpolation  # of the picture
    fill: Sequence[float]  # colour around a picture that is smaller than the crop, 0..255 for each channel
    ignore_index: int  # label there

    def __post_init__(self) -> None:
        changes = v2.RandomPhotometricDistort(
            brightness=(1 - 32 / 255, 1 + 32 / 255), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.1, 0.1),
            p=self.options.distort,
        )  # fmt: skip
        self.distort = changes if self.options.distort and len(self.fill) == 3 else None

    def __call__(self, picture: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``(C, H, W)`` of its type and ``(H, W)`` of ``int64``, both of the size of the crop."""
        pixels, mask = to_tensor(picture), labels[None]  # torchvision 0.26 resizes a tv_tensors.Mask by another rule
        low, high = self.options.scale
        short = (low + (high - low) * float(torch.rand(()))) * min(self.size)
        factor = min(short / min(labels.shape), LONG_SIDES * short / max(labels.shape))
        shape = [max(1, round(side * factor)) for side in labels.shape]
        pixels = tvf.resize(pixels, shape, interpolation=resampling_of(self.interpolation), antialias=True)
        mask = tvf.resize(mask, shape, interpolation=v2.InterpolationMode.NEAREST_EXACT)
        top, left = self._corner(mask[0], shape)
        height, width = (min(side, crop) for side, crop in zip(shape, self.size, strict=True))
        pixels, mask = tvf.crop(pixels, top, left, height, width), tvf.crop(mask, top, left, height, width)
        if torch.rand(()) < self.options.hflip:
            pixels, mask = tvf.horizontal_flip(pixels), tvf.horizontal_flip(mask)
        if self.distort is not None:
            pixels = self.distort(pixels)
        around = [0, 0, self.size[1] - width, self.size[0] - height]  # left, top, right, bottom
        pixels = tvf.pad(pixels, around, fill=list(self.fill))
        mask = tvf.pad(mask, around, fill=self.ignore_index)
        return pixels, mask[0]

    def _corner(self, mask: Tensor, shape: Sequence[int]) -> tuple[int, int]:
        """Top and left of a crop that no class fills too much."""
        largest = self.options.largest_class
        for _ in range(CROPS):
            top, left = (
                int(torch.randint(max(side - crop, 0) + 1, ())) for side, crop in zip(shape, self.size, strict=True)
            )
            window = mask[top : top + self.size[0], left : left + self.size[1]]
            counts = torch.unique(window[window != self.ignore_index], return_counts=True)[1]
            if largest == 1 or (len(counts) > 1 and counts.max() <= largest * counts.sum()):
                break
        return top, left


def whole_picture(preprocessing: Preprocessing, picture: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The picture as evaluation sees it, ``(C, h, w)``, and its labels as they are stored."""
    return preprocessing.pixels(picture), labels


def find_columns(features: Features, image: str | None, mask: str | None) -> tuple[str, str]:
    """Names of the columns of pictures and of masks: those that are asked for, else by type and name."""
    mask = find_column(
        features, "mask column", "masks.column", mask,
        lambda name, feature: name in MASK_NAMES and isinstance(feature, Image),
        lambda name, feature: name in MASK_NAMES and is_text(feature),
    )  # fmt: skip
    image = find_column(
        features, "image column", "reading.image_column", image,
        lambda name, feature: name != mask and isinstance(feature, Image),
        lambda name, feature: name != mask and is_text(feature),  # a table with the paths of pictures
        usual=IMAGE_NAMES,
    )  # fmt: skip
    return image, mask


def read_pairs(folder: str) -> dict[str, Dataset]:
    """Read pictures and masks that belong together by their file names; each needs the other.

    They are in ``FOLDER/images`` and ``FOLDER/masks``, ``FOLDER/SPLIT/images`` and so on, or ``FOLDER/images/SPLIT``.

    Returns:
        Columns ``image`` and ``mask`` for each split; nothing where there are no such folders.
    """
    root = Path(folder)
    roots = {split: _pair_of(path) for path in sorted(root.iterdir()) if (split := split_of(path.name))}
    found = {split: pair for split, pair in roots.items() if pair is not None}
    if found and (others := sorted(roots.keys() - found.keys())):
        why = f"they do not hold both {IMAGE_FOLDERS[0]}/ and {MASK_FOLDERS[0]}/"
        rank_zero_warn(f"{folder}: the folders of {', '.join(others)} are not used, for {why}")
    if not found and (pair := _pair_of(root)) is not None:
        inner = {split: path for path in sorted(pair[0].iterdir()) if path.is_dir() and (split := split_of(path.name))}
        found = {split: (path, pair[1] / path.name) for split, path in inner.items()} or {"train": pair}
    return {split: _read_pair(*found[split]) for split in SPLIT_NAMES if split in found}


def _pair_of(folder: Path) -> tuple[Path, Path] | None:
    """The folders of pictures and of masks in a folder."""
    images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    masks = next((folder / name for name in MASK_FOLDERS if (folder / name).is_dir()), None)
    return (images, masks) if images and masks else None


def _read_pair(images: Path, masks: Path) -> Dataset:
    """One split: the pictures of a folder, each with the mask of the same name."""
    pictures, targets = _by_name(images), _by_name(masks)
    for one, other, kind, missing in ((pictures, targets, "picture", "mask"), (targets, pictures, "mask", "picture")):
        if alone := sorted(one.keys() - other.keys()):
            problem = f"{len(alone)} of {len(one)} files have no {missing}, the first is {one[alone[0]]}"
            raise ValueError(f"{problem}; each {kind} has a {missing} of the same name ({images} and {masks})")
    if not pictures:
        raise ValueError(f"{images} holds no picture")
    columns = {"image": list(pictures.values()), "mask": [targets[name] for name in pictures]}
    return Dataset.from_dict(columns, Features({"image": Image(decode=False), "mask": Image(decode=False)}))


def _by_name(folder: Path) -> dict[str, str]:
    """The pictures of a folder by their paths in it, without suffixes and sorted."""
    paths, notes = list_pictures(folder)
    for note in notes:
        rank_zero_warn(note)
    names: dict[str, str] = {}
    for path in paths:
        other = names.setdefault(Path(path).relative_to(folder).with_suffix("").as_posix(), path)
        if other != path:
            raise ValueError(f"{other} and {path} have one name; a picture and its mask are found by it")
    return dict(sorted(names.items()))


def read_class_names(folder: str) -> list[str]:
    """Names of the classes from a file in the folder of the data."""
    path = next((path for name in ("classes.txt", "id2label.json") if (path := Path(folder, name)).is_file()), None)
    if path is None:
        raise ValueError(
            f"the names of the classes are not in {folder}; write classes.txt, a name for each number from 0 on a line "
            "of its own, or give masks.class_names, the names or their number"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = [line.strip() for line in text.rstrip().splitlines()]
        if path.suffix == ".json":
            table = {int(number): str(name) for number, name in json.loads(text).items()}
            names = [table[number] for number in range(len(table))]
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a table of class numbers from 0 and their names ({type(error).__name__}: {error})"
        ) from error
    if not names or "" in names or len(set(names)) < len(names):
        raise ValueError(f"{path} has the names {shorten(names)}; give each class another name, none of them empty")
    return names
