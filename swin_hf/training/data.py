"""Any image dataset, as batches that a Swin can learn from: :class:`ImageDataModule`.

Pictures travel as ``uint8`` and are normalised on the device. How the order and the random numbers are made
reproducible is told in :mod:`swin_hf.training.sampling`; how columns and classes are found, in
:mod:`swin_hf.training.sources`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.utils.data
from datasets.distributed import split_dataset_by_node
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import BaseImageProcessor

from swin_hf.files import redact, replacing
from swin_hf.memory import check_batch
from swin_hf.model.pixels import GREY_MAXIMUM, IMAGENET_MEAN, IMAGENET_STD
from swin_hf.processing import RESAMPLING, Interpolation, Preprocessing, UnreadablePictureError, short_side
from swin_hf.ranges import SIDES, check_range

from . import sampling, sources
from .pictures import (
    Batch,
    OnError,
    PictureDataset,
    PictureReader,
    PictureStream,
    channel_statistics,
    collate,
    measure_grey_maximum,
)
from .reading import FORMATS
from .splits import announce_classes, count_classes, divide
from .transforms import AutoAugment, TrainTransform, normalize

# What a number may be; where a machine has a limit of its own, it is met later and told then.
_RANGES = {
    "[1, 1e6]": "batch_size eval_batch_size",
    "[1, inf)": "limit_train",
    "[0, 1024]": "num_workers",
    "[0, 4096]": "crop_padding",
    "[0, 4294967295]": "seed split_seed",
    "[0, 255]": "background",
    "[1, 65535]": "grey_maximum",
    "[0, 1)": "validation_fraction test_fraction",
    "[0, 1]": "hflip erasing",
    "(0, 1]": "crop_scale crop_pct",
    "(0, inf)": "crop_ratio",
}
ResizeMode = Literal["crop", "squash"]
SHUFFLE_BUFFER = 4096  # stored (not decoded) pictures that a stream is shuffled among


class ImageDataModule(LightningDataModule):
    """Training, validation and test batches of any image dataset that ``datasets`` reads.

    Without a validation split, a stratified share of the training split is held out; the test split is never used to
    choose anything. Batches are ``{"pixel_values": (B, C, H, W), "labels": (B,)}``.

    Args:
        dataset: Hub id, local folder, a folder written by save_to_disk, swin_hf:digits (handwritten digits, in the
            package), or a format: imagefolder, parquet, webdataset, arrow, csv, json.
        data_files: Files of the format: a pattern, a list, or one of them for each of train, validation and test.
            Relative paths of pictures start from the folder of the split's files.
        data_dir: Folder of the format; data_files and the paths of pictures are relative to it.
        config_name: Configuration of a Hub dataset.
        revision: Branch, tag or commit of a Hub dataset.
        streaming: Read while training, without a local copy; needs trainer.limit_train_batches.
        image_column: Image column; found by type when there is only one.
        label_column: Label column; found by type when there is only one.
        labelled: False for pictures without labels, as in pre-training.
        class_names: Names of the classes, or their number, where the data do not declare them as a ClassLabel; a stream
            of such data needs it. Integer labels count from 0.
        image_size: Height and width in pixels, or one number for both.
        num_channels: 3 (RGB) or 1 (grey).
        batch_size: Training pictures per step on each device.
        eval_batch_size: Pictures per evaluation step on each device; batch_size if not given.
        num_workers: Loader processes per device; if not given, 0 on the CPU and up to 8 otherwise.
        validation_fraction: Share of the training split to hold out when the dataset has no validation split.
        test_fraction: Share of the training split to hold out when the dataset has no test split.
        limit_train: Use only this many training pictures, drawn at random and stratified.
        seed: Seed of the order and of the augmentation; seed_everything's if not given.
        split_seed: Seed of the held-out shares, so that another seed does not change what is measured.
        mean: Mean of each channel for values in 0..1; ImageNet's if not given, "dataset" to measure it.
        std: Standard deviation of each channel; likewise.
        crop_scale: Least and greatest area of the random resized crop.
        crop_ratio: Least and greatest width-to-height ratio of the random resized crop.
        crop_padding: Resize, pad by so many pixels and crop at random, in place of the random resized crop.
        hflip: Probability of a horizontal flip.
        auto_augment: randaugment, trivialaugment, or nothing.
        erasing: Probability of random erasing, with noise.
        interpolation: nearest, bilinear or bicubic.
        resize_mode: Evaluation: crop (shorter side, then centre crop) or squash (all of the picture).
        crop_pct: Evaluation: share of the shorter side that the centre crop keeps.
        background: Red, green and blue (0..255) behind transparent pixels.
        grey_maximum: Value that is white in grey pictures of 16 bits: 4095 where they hold 12; found from a sample of
            the pictures if not given.
        on_error: What to do with an unreadable picture: raise, skip, or replace (by another one, in training only).
    """

    def __init__(
        self,
        dataset: str = "parquet",
        data_files: str | list[str] | dict[str, str | list[str]] | None = None,
        data_dir: str | None = None,
        config_name: str | None = None,
        revision: str | None = None,
        streaming: bool = False,
        image_column: str | None = None,
        label_column: str | None = None,
        labelled: bool = True,
        class_names: list[str] | int | None = None,
        image_size: int | tuple[int, int] = 32,
        num_channels: int = 3,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.0,
        limit_train: int | None = None,
        seed: int | None = None,
        split_seed: int = 0,
        mean: list[float] | Literal["dataset"] | None = None,
        std: list[float] | Literal["dataset"] | None = None,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        crop_padding: int | None = None,
        hflip: float = 0.5,
        auto_augment: AutoAugment | None = None,
        erasing: float = 0.0,
        interpolation: Interpolation = "bicubic",
        resize_mode: ResizeMode = "crop",
        crop_pct: float = 0.875,
        background: tuple[int, int, int] = (255, 255, 255),
        grey_maximum: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__()
        self.dataset, self.data_files, self.data_dir = dataset, data_files, data_dir
        self.config_name, self.revision, self.streaming = config_name, revision, streaming
        self.image_column, self.label_column, self.labelled = image_column, label_column, labelled
        self.class_names = class_names
        check_range("image_size", image_size, SIDES)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.num_channels = num_channels
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.validation_fraction, self.test_fraction, self.limit_train = validation_fraction, test_fraction, limit_train
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.split_seed = split_seed
        self.mean, self.std = self._channel_values(mean, IMAGENET_MEAN), self._channel_values(std, IMAGENET_STD)
        self.crop_scale, self.crop_ratio, self.crop_padding = crop_scale, crop_ratio, crop_padding
        self.hflip, self.auto_augment, self.erasing = hflip, auto_augment, erasing
        self.interpolation, self.resize_mode, self.crop_pct = interpolation, resize_mode, crop_pct
        self.background, self.grey_maximum, self.on_error = background, grey_maximum, on_error
        self._check_options()
        self._source: sources.Source | None = None
        self._rows: dict[str, np.ndarray[Any, Any]] = {}
        self._labels: dict[str, np.ndarray[Any, Any]] = {}
        self._held_out: list[str] = []
        self._fingerprint = ""
        self._restored: dict[str, Any] | None = None
        self._unreadable: dict[str, str] = {}
        self._announced = False

    def _channel_values(self, values: Any, imagenet: Sequence[float]) -> list[float] | Literal["dataset"]:
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels {self.num_channels} is neither 3 (RGB) nor 1 (grey)")
        if values == "dataset":
            return "dataset"
        if values is None:  # the grey of ImageNet is the mean of its colours
            values = imagenet if self.num_channels == 3 else [sum(imagenet) / 3]
        if len(values) != self.num_channels:
            raise ValueError(f"{len(values)} values {list(values)} in mean or std for {self.num_channels} channels")
        return [float(value) for value in values]

    def _check_options(self) -> None:
        for interval, names in _RANGES.items():
            for name in names.split():
                check_range(name, getattr(self, name), interval)
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is {getattr(self, name)}; give the lesser number first")
        if not isinstance(self.class_names, list):
            check_range("class_names", self.class_names, "[1, inf)")
        elif len(set(self.class_names)) < len(self.class_names):
            raise ValueError(f"class_names {sources.shorten(self.class_names)} names a class twice")
        for name, interval in (("mean", "(-inf, inf)"), ("std", "(0, inf)")):
            if getattr(self, name) != "dataset":
                check_range(name, getattr(self, name), interval)
        check_batch(max(self.batch_size, self.eval_batch_size), self.num_channels, self.image_size)
        if len(self.background) != 3:
            raise ValueError(f"background is {self.background}; give red, green and blue in [0, 255]")
        if self.interpolation not in RESAMPLING:
            raise ValueError(f"interpolation {self.interpolation!r} is none of {sorted(RESAMPLING)}")
        if self.resize_mode not in ("crop", "squash"):
            raise ValueError(f"resize_mode {self.resize_mode!r} is neither 'crop' nor 'squash'")
        if self.auto_augment not in (None, "randaugment", "trivialaugment"):
            raise ValueError(f"auto_augment {self.auto_augment!r} is neither 'randaugment' nor 'trivialaugment'")
        if self.on_error not in ("raise", "skip", "replace"):
            raise ValueError(f"on_error {self.on_error!r} is none of 'raise', 'skip' and 'replace'")
        if self.dataset in FORMATS and self.data_files is None and self.data_dir is None:
            raise ValueError(f"dataset {self.dataset!r} is a format; say where the files are: data_files or data_dir")

    # What the data are. Everything below loads the dataset when it is first asked for.

    def load(self) -> sources.Source:
        """Load the dataset, find columns and classes, and hold out what has to be held out. Idempotent."""
        if self._source is None:
            source = sources.load_source(
                self.dataset,
                data_files=self.data_files,
                data_dir=self.data_dir,
                config_name=self.config_name,
                revision=self.revision,
                streaming=self.streaming,
                image_column=self.image_column,
                label_column=self.label_column,
                labelled=self.labelled,
                class_names=self.class_names,
            )
            if not self.streaming:
                self._rows, self._labels, self._held_out = divide(
                    source,
                    {"test": self.test_fraction, "validation": self.validation_fraction},
                    self.limit_train,
                    self.split_seed,
                )
            self._fingerprint = sources.fingerprint(source)
            self._source = source
            self._measure()
        return self._source

    def _measure(self) -> None:
        """Find the white of 16-bit pictures; replace mean="dataset" and std="dataset" by statistics. From samples."""
        if self.grey_maximum is None:
            self.grey_maximum = measure_grey_maximum(self.load())
        if "dataset" not in (self.mean, self.std):
            return
        if self.streaming:
            raise ValueError('mean="dataset" needs the pictures at hand; give numbers when streaming')
        if "train" not in self._rows:
            raise ValueError('mean="dataset" is measured on a training split, and there is none; give its numbers')
        squash = Preprocessing(self.image_size, None, interpolation=self.interpolation).pixels
        mean, std = channel_statistics(self._dataset("train", squash, training=False), self.num_channels)
        self.mean = mean if self.mean == "dataset" else self.mean
        self.std = std if self.std == "dataset" else self.std

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.load().class_names)

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class id."""
        return dict(enumerate(self.load().class_names))

    def renumber(self, order: Sequence[int], names: Sequence[str]) -> None:
        """Number the classes as a model does that is measured on these data.

        Args:
            order: The model's number of each class.
            names: All classes of the model.
        """
        self.load().renumber(order, names)
        self._labels = {split: np.asarray(order)[labels] for split, labels in self._labels.items()}

    @property
    def class_counts(self) -> dict[str, int]:
        """Training pictures of each class; empty for a stream and without a training split."""
        source = self.load()
        if self.streaming or source.label_column is None or "train" not in self._labels:
            return {}
        counts = count_classes(self._labels["train"], len(source.class_names))
        return dict(zip(source.class_names, counts.tolist(), strict=True))

    @property
    def split_sizes(self) -> dict[str, int]:
        """Number of pictures in each split that there is; empty for a stream."""
        self.load()
        return {name: len(self._rows[name]) for name in ("train", "validation", "test") if name in self._rows}

    @property
    def has_test(self) -> bool:
        """Whether there is a test split with labels."""
        return "test" in self.load().splits if self.streaming else "test" in self.split_sizes

    @property
    def train_size(self) -> int:
        """Number of training pictures in an epoch, before the remainder of the last batch is dropped."""
        if not self.streaming:
            return self.split_sizes.get("train", 0)
        world_size = self.trainer.world_size if self.trainer is not None else 1
        return self._stream_steps() * self.batch_size * world_size

    @property
    def fingerprint(self) -> str:
        """Hash of the training data that is the same on every machine."""
        self.load()
        return self._fingerprint

    def steps_per_epoch(self, world_size: int = 1, accumulate: int = 1) -> int:
        """Number of optimiser steps in an epoch, by arithmetic: no loader is built, so resuming stays exact.

        ``trainer.limit_train_batches`` is taken into account when the data module belongs to a trainer.

        Args:
            world_size: Number of ranks.
            accumulate: Batches per optimiser step.
        """
        if self.streaming:
            batches = self._stream_steps()
        else:
            batches = sampling.epoch_batches(self.train_size, self.batch_size, world_size)
            limit = self.trainer.limit_train_batches if self.trainer is not None else 1.0
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return -(-batches // accumulate)

    def _stream_steps(self) -> int:
        trainer = self.trainer
        return sampling.check_stream(
            num_shards=self.load().num_shards,
            world_size=trainer.world_size if trainer is not None else 1,
            num_workers=self._workers(),
            steps=trainer.limit_train_batches if trainer is not None else None,
        )

    @property
    def preprocessing(self) -> Preprocessing:
        """How evaluation pictures are prepared; what is saved with the weights says the same."""
        self.load()  # measures mean="dataset"
        return Preprocessing(
            self.image_size,
            None if self.resize_mode == "squash" else short_side(self.image_size, self.crop_pct),
            tuple(float(value) for value in self.mean),
            tuple(float(value) for value in self.std),
            self.interpolation,
            tuple(self.background),
            self.grey_maximum or GREY_MAXIMUM,
        )

    def image_processor(self) -> BaseImageProcessor:
        """The image processor to save with the weights: same pixels as this module's evaluation batches."""
        return self.preprocessing.processor()

    def facts(self) -> dict[str, Any]:
        """What a model card should know about the data; plain values, no absolute path."""
        source = self.load()
        return {
            "dataset": _shareable(self.dataset),
            "config_name": self.config_name,
            "revision": self.revision,
            "data_files": _shareable(self.data_files),
            "data_dir": _shareable(self.data_dir),
            "streaming": self.streaming,
            "fingerprint": self.fingerprint,
            "splits": self.split_sizes,
            "held_out": list(self._held_out),
            "split_seed": self.split_seed,
            "class_names": list(source.class_names),
            "class_counts": self.class_counts,
            "image_size": list(self.image_size),
            "num_channels": self.num_channels,
            "mean": self.mean,
            "std": self.std,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "augmentation": {
                "crop": {"padding": self.crop_padding}
                if self.crop_padding is not None
                else {"scale": list(self.crop_scale), "ratio": list(self.crop_ratio)},
                "hflip": self.hflip,
                "auto_augment": self.auto_augment,
                "erasing": self.erasing,
            },
            "evaluation": {"resize_mode": self.resize_mode, "crop_pct": self.crop_pct}
            if self.resize_mode == "crop"
            else {"resize_mode": self.resize_mode},
            "interpolation": self.interpolation,
            "background": list(self.background),
            "grey_maximum": self.grey_maximum,
            "on_error": self.on_error,
            "unreadable": len(self._unreadable),
        }

    # Lightning's hooks, in the order in which they run.

    def prepare_data(self) -> None:
        """Download once per node."""
        self.load()

    def setup(self, stage: str) -> None:
        """Check how the processes were started, print the class table and record the held-out rows."""
        source = self.load()
        trainer = self.trainer
        if trainer is not None:
            sampling.check_launch(trainer)
        if stage != "fit":
            return
        if "train" not in source.splits:
            raise ValueError(
                f"{self.dataset!r} has no training split, only {sorted(source.splits)}; give one to train on (the files"
                " of each split in data_files), or measure a checkpoint on these pictures with test or validate"
            )
        if self.streaming:
            self._stream_steps()
        elif self.labelled and not self._announced:
            counts = {name: count_classes(self._labels[name], len(source.class_names)) for name in self.split_sizes}
            announce_classes(source, counts)
            self._announced = True
        if trainer is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Asked for by every rank: Lightning broadcasts it. Without a logger it is default_root_dir, which is the
            # working directory where nobody gave one.
            folder = trainer.log_dir
            if trainer.logger is None and folder is not None and Path(folder).resolve() == Path.cwd():
                folder = None
            if folder is not None and trainer.is_global_zero:
                self.save_split(folder)

    def save_split(self, folder: str | Path) -> None:
        """Write ``split.json``: which rows of the stored training split were held out, and how to draw them again."""
        self.load()
        if not self._held_out:
            return
        record = {
            "dataset": _shareable(self.dataset),
            "fingerprint": self.fingerprint,
            "split_seed": self.split_seed,
            **{name: self._rows[name].tolist() for name in self._held_out},
        }
        with replacing(Path(folder, "split.json")) as partial:
            partial.write_text(json.dumps(record) + "\n")

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training split, from where a restored run stopped."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        if trainer is not None:
            if self._restored is not None:
                sampling.check_restored(trainer, self._restored, self._state(), self.batch_size)
                self._restored = None
            sampling.rewind_to_optimizer_step(trainer)
        transform = TrainTransform(
            self.image_size,
            self.crop_scale,
            self.crop_ratio,
            self.crop_padding,
            self.hflip,
            self.auto_augment,
            self.interpolation,
            fill=[round(255 * value) for value in self.mean if isinstance(value, float)],
        )
        position = (lambda: sampling.training_position(trainer)) if trainer is not None else None
        if self.streaming:
            return sampling.ResumableLoader(
                self._stream("train", transform, rank, world_size),
                position=position,
                steps=self._stream_steps(),
                batch_size=self.batch_size,
                **self._loader_options(persistent=False),
            )
        data = self._dataset("train", transform, training=True)
        sampler = sampling.EpochSampler(len(data), self.batch_size, self.seed, rank, world_size)
        return sampling.ResumableLoader(
            data,
            position=position,
            batch_size=min(self.batch_size, sampler.num_samples),
            sampler=sampler,
            drop_last=True,
            **self._loader_options(persistent=True),
        )

    def val_dataloader(self) -> Any:
        """Batches of the validation split, each picture once; an empty list if there is none."""
        return self._eval_loader("validation", persistent=True) if self._has("validation") else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, each picture once."""
        if not self._has("test"):
            raise ValueError(
                f"{self.dataset!r} has no test split with labels (found {sorted(self.load().splits)}); name its files"
                " in data_files, or hold out a share with test_fraction before training"
            )
        return self._eval_loader("test", persistent=False)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, or of the validation split if there is none."""
        return self._eval_loader("test" if self._has("test") else "validation", persistent=False)

    def _has(self, name: str) -> bool:
        return name in (self.load().splits if self.streaming else self.split_sizes)

    def _eval_loader(self, name: str, persistent: bool) -> DataLoader[Any]:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        transform = self.preprocessing.pixels
        if self.streaming:
            stream = self._stream(name, transform, rank, world_size)
            return DataLoader(stream, batch_size=self.eval_batch_size, **self._loader_options(persistent=False))
        data = self._dataset(name, transform, training=False)
        if len(data) < world_size:
            raise ValueError(f"{len(data)} pictures of split {name!r} for {world_size} ranks; use fewer devices")
        sampler = UnrepeatedDistributedSampler(data, num_replicas=world_size, rank=rank, shuffle=False)
        return DataLoader(
            data, batch_size=self.eval_batch_size, sampler=sampler, **self._loader_options(persistent=persistent)
        )

    def _dataset(self, name: str, transform: Callable[[Any], Tensor], training: bool) -> PictureDataset:
        source = self.load()
        stored = name if name in source.splits else "train"  # held out of the training split
        reader = self._reader(stored, transform)
        labels = self._labels[name] if source.label_column is not None else None
        return PictureDataset(source.splits[stored], self._rows[name], labels, reader, self.seed, training)

    def _reader(self, split: str, transform: Callable[[Any], Tensor]) -> PictureReader:
        white = self.grey_maximum or GREY_MAXIMUM
        return PictureReader(
            self.load(), split, transform, self.num_channels, self.background, self.on_error, grey_maximum=white
        )

    def _stream(self, name: str, transform: Callable[[Any], Tensor], rank: int, world_size: int) -> PictureStream:
        source = self.load()
        reader = self._reader(name, transform)
        data = source.splits[name].select_columns(reader.columns)
        if name == "train":
            data = data.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        data = split_dataset_by_node(data, rank, world_size)
        if name == "train":
            data = data.repeat(None)
        batch_size = self.batch_size if name == "train" else self.eval_batch_size
        return PictureStream(data, source, reader, self.seed, rank, batch_size)

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if self.trainer is None or self.trainer.strategy.root_device.type == "cpu":
            return 0  # the model needs the cores more
        local = max(1, self.trainer.num_devices)
        workers = min(8, len(os.sched_getaffinity(0)) // local)
        return min(workers, self.load().num_shards // self.trainer.world_size) if self.streaming else workers

    def _loader_options(self, persistent: bool) -> dict[str, Any]:
        workers = self._workers()
        return {
            "num_workers": workers,
            "collate_fn": collate,
            "persistent_workers": persistent and workers > 0,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Take the names of unreadable pictures out of the batch and remember them.

        Raises:
            UnreadablePictureError: If no picture of the batch can be read, other than in validation and test.
        """
        unreadable = batch.pop("unreadable", ())
        for message in unreadable:
            self._unreadable.setdefault(message.split(": ", 1)[0], message)
        evaluating = self.trainer is not None and (self.trainer.evaluating or self.trainer.sanity_checking)
        if unreadable and not batch and not evaluating:
            raise UnreadablePictureError(f"no picture of a batch of {len(unreadable)} can be read: {unreadable[0]}")
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Seed the training batch, then normalise and erase on the device."""
        trainer = self.trainer
        training = trainer is not None and trainer.training
        if trainer is not None and training:
            sampling.seed_batch(trainer, self.seed, "pixels")
        pixels = batch.get("pixel_values")
        if pixels is not None and pixels.dtype == torch.uint8:
            pixels = normalize(pixels, self.mean, self.std)  # type: ignore[arg-type]
            if training and self.erasing > 0:
                erase = v2.RandomErasing(self.erasing, value="random", inplace=True)
                for picture in pixels:
                    erase(picture)
            if trainer is not None and trainer.lightning_module is not None:
                pixels = pixels.to(trainer.lightning_module.dtype)
            batch["pixel_values"] = pixels
        return batch

    def share_unreadable(self) -> None:
        """Tell every rank which pictures any of them could not read; all of them call it, at the end of an epoch."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            found: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found, self._unreadable)
            for part in found:
                self._unreadable |= part

    def teardown(self, stage: str) -> None:
        """Say how many pictures could not be read."""
        if self._unreadable:
            examples = "\n  ".join(list(self._unreadable.values())[:10])
            rank_zero_info(f"{len(self._unreadable)} pictures could not be read ({self.on_error}):\n  {examples}")

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """What must not change between an interruption and its resumption.

        Until a restored state has been compared with this run's, it is passed on as it is: a run that is refused saves
        its state like any other that fails, and must not be accepted the next time.
        """
        return self._state() if self._restored is None else self._restored

    def _state(self) -> dict[str, Any]:
        trainer = self.trainer
        world_size, accumulate = (
            (trainer.world_size, trainer.accumulate_grad_batches) if trainer is not None else (1, 1)
        )
        return {
            "fingerprint": self.fingerprint,
            "train_size": self.split_sizes.get("train"),
            "split_seed": self.split_seed,
            "seed": self.seed,
            "global_batch": self.batch_size * world_size,
            "images_per_step": self.batch_size * world_size * accumulate,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state of the interrupted run; it is compared when training goes on."""
        self._restored = state_dict


def _shareable(value: Any) -> Any:
    """Replace absolute paths by what is below the working directory, or by the file name; redact the rest."""
    if isinstance(value, dict):
        return {key: _shareable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shareable(item) for item in value]
    if isinstance(value, str) and os.path.isabs(value):
        path = Path(value)
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
    return redact(value)
