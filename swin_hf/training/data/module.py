"""Any image dataset, as batches that a Swin can learn from: :class:`ImageDataModule`.

Pictures of 1 and 3 channels travel as ``uint8``, others as float32; they are normalised on the device. How the order
and the random numbers are made reproducible is told in :mod:`swin_hf.training.data.sampling`; how columns and classes
are found, in :mod:`swin_hf.training.data.sources`.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.utils.data
from datasets.distributed import split_dataset_by_node
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import BaseImageProcessor

from swin_hf.files import redact, replacing
from swin_hf.hub.facts import DataFacts, SplitFacts
from swin_hf.memory import check_batch
from swin_hf.model.pixels import GREY_MAXIMUM
from swin_hf.processing import Preprocessing, UnreadablePictureError, decode_pixels, short_side
from swin_hf.ranges import SIDES, check_range

from . import sampling, sources
from .pictures import Batch, PictureDataset, PictureReader, PictureStream, collate
from .reading import FORMATS, DataFiles, Reading, flat
from .splits import Splits, announce_classes, divide
from .transforms import Augmentation, Pixels, normalize, random_transform
from .values import channel_statistics, find_channels, find_white, look_at_pictures

MEASURED = ("mean", "std", "grey_maximum")  # options of pixels that may be found in the data; a checkpoint has them
SHUFFLE_BUFFER = 4096  # stored (not decoded) pictures that a stream is shuffled among


class ImageDataModule(LightningDataModule):
    """Training, validation and test batches of any image dataset that ``datasets`` reads.

    Without a validation split, a stratified share of the training split is held out; the test split is never used to
    choose anything. Batches are ``{"pixel_values": (B, C, H, W), "labels": (B,)}``.

    A task with other targets has a subclass, which replaces :attr:`source_class` or :meth:`find_source`,
    :meth:`reader`, :meth:`train_transform` and :meth:`eval_transform`.

    Args:
        dataset: Hub id (a folder of pictures on the Hub is copied first), local folder, a folder written by
            save_to_disk, swin_hf:digits (handwritten digits, in the package), or a format: imagefolder, parquet,
            webdataset, arrow, csv, json.
        data_files: Files of the format: a pattern, a list, or one of them for each of train, validation and test.
            Relative paths of pictures start from the folder of the split's files.
        data_dir: Folder of the format; data_files and the paths of pictures are relative to it.
        image_size: Height and width in pixels, or one number for both.
        num_channels: 3 (RGB), 1 (grey), or all that the files have; that of .npy files, and 3 of others, if not given.
        batch_size: Training pictures per step on each device.
        eval_batch_size: Pictures per evaluation step on each device; batch_size if not given.
        num_workers: Loader processes per device; if not given, 0 on the CPU and up to 8 otherwise.
        reading: How the data set is read.
        splits: What is held out, and how much is trained on.
        augmentation: How training pictures are changed at random.
        pixels: What the values of a picture mean, and what evaluation sees of it.
    """

    collate = staticmethod(collate)
    source_class: ClassVar[type[sources.Source]] = sources.Source  # what the labels are
    augmentation: Any  # an Augmentation, or that of a task
    colour_options: ClassVar[dict[str, Any]] = {"auto_augment": None}  # what of it changes colours, and its "off"
    num_channels: Any  # None until the data are loaded, if not given

    def __init__(
        self,
        dataset: str = "parquet",
        data_files: DataFiles | None = None,
        data_dir: str | None = None,
        image_size: int | tuple[int, int] = 32,
        num_channels: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        reading: Reading = Reading(),
        splits: Splits = Splits(),
        augmentation: Augmentation = Augmentation(),
        pixels: Pixels = Pixels(),
    ) -> None:
        super().__init__()
        # What a number may be; where a machine has a limit of its own, it is met later and told then.
        for name, number, interval in (
            ("image_size", image_size, SIDES),
            ("num_channels", num_channels, "[1, 65536]"),
            ("batch_size", batch_size, "[1, 1e6]"),
            ("eval_batch_size", eval_batch_size, "[1, 1e6]"),
            ("num_workers", num_workers, "[0, 1024]"),
        ):
            check_range(name, number, interval)
        if dataset in FORMATS and data_files is None and data_dir is None:
            raise ValueError(f"dataset {dataset!r} is a format; say where the files are: data_files or data_dir")
        self.dataset, self.data_files, self.data_dir = dataset, data_files, data_dir
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.num_channels, self.num_workers, self.batch_size = num_channels, num_workers, batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.reading, self.splits, self.augmentation, self.pixels = reading, splits, augmentation, pixels
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if reading.seed is None else reading.seed
        self.mean, self.std = pixels.channel_values(num_channels or 3)
        self.grey_maximum = pixels.grey_maximum
        check_batch(max(self.batch_size, self.eval_batch_size), num_channels or 3, self.image_size)
        self._source: sources.Source | None = None
        self._rows: dict[str, np.ndarray[Any, Any]] = {}
        self._labels: dict[str, np.ndarray[Any, Any]] = {}
        self._held_out: list[str] = []
        self._fingerprint = ""
        self._restored: dict[str, Any] | None = None
        self._unreadable: dict[str, str] = {}
        self._announced = False
        self.batch_sources: list[tuple[int, str]] = []  # row and name of each picture of a batch of a test

    # What the data are. Everything below loads the dataset when it is first asked for.

    def load(self) -> sources.Source:
        """Load the dataset, find columns and classes, and hold out what has to be held out. Idempotent."""
        if self._source is not None:
            return self._source
        source, streaming = self.find_source(), self.reading.streaming
        if not streaming:
            self._rows, self._labels, self._held_out = divide(source, self.splits)
        self._fingerprint = sources.fingerprint(source)
        self._source = source
        has_classes = type(source) is sources.Source and source.label_column is not None
        if self.splits.balanced_sampling and (streaming or not has_classes):
            problem = "the classes of a stream are not known before they come"
            problem = problem if streaming else "these pictures do not have one class each"
            raise ValueError(f"splits.balanced_sampling draws equally many pictures of each class, and {problem}")
        self._measure(source)
        return source

    def _measure(self, source: sources.Source) -> None:
        """Find channels, white of 16-bit pictures and, if asked for, mean and standard deviation, all from samples."""
        wanted = self.num_channels
        looks = look_at_pictures(source) if wanted not in (1, 3) or self.grey_maximum is None else []
        self.num_channels = find_channels(looks, wanted)
        if wanted is None and self.num_channels != 3:
            rank_zero_info(f"num_channels {self.num_channels}, as in {looks[0].name}")
            self.mean, self.std = self.pixels.channel_values(self.num_channels)
            check_batch(max(self.batch_size, self.eval_batch_size), self.num_channels, self.image_size)
        if self.num_channels not in (1, 3):
            self.grey_maximum = self.grey_maximum or GREY_MAXIMUM
            for name, off in self.colour_options.items():
                if (asked := getattr(self.augmentation, name)) != off:
                    why = f"it changes colours, and these pictures have {self.num_channels} channels"
                    rank_zero_info(f"augmentation.{name} {asked} is left out: {why}")
                    self.augmentation = replace(self.augmentation, **{name: off})
        elif self.grey_maximum is None:
            self.grey_maximum = find_white(looks)
        if "dataset" not in (self.mean, self.std):
            return
        if self.reading.streaming:
            raise ValueError('mean="dataset" needs the pictures at hand; give numbers when streaming')
        if "train" not in self._rows:
            raise ValueError('mean="dataset" is measured on a training split, and there is none; give its numbers')
        squash = Preprocessing(self.image_size, None, interpolation=self.pixels.interpolation).pixels
        reader = ImageDataModule.reader(self, "train", squash)  # whatever the targets of the task are
        data = PictureDataset(source.splits["train"], self._rows["train"], None, reader, self.seed, False)
        mean, std = channel_statistics(data, self.num_channels)
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
        """Number the classes as a model does, whose number of each is in ``order`` and whose classes are ``names``."""
        self.load().renumber(order, names)
        self._labels = {split: self.load().reorder(labels, order) for split, labels in self._labels.items()}

    @property
    def class_counts(self) -> dict[str, int]:
        """Training pictures of each class; empty for a stream and without a training split."""
        source = self.load()
        if source.label_column is None or "train" not in self._labels:
            return {}
        counts = source.counts(self._labels["train"])
        return dict(zip(source.class_names, counts.tolist(), strict=True))

    @property
    def split_sizes(self) -> dict[str, int]:
        """Number of pictures in each split that there is; empty for a stream."""
        self.load()
        return {name: len(self._rows[name]) for name in ("train", "validation", "test") if name in self._rows}

    def has(self, name: str) -> bool:
        """Whether a split of this name can be used: there is one and, outside of a stream, some rows have a label."""
        return name in (self.load().splits if self.reading.streaming else self.split_sizes)

    @property
    def _ranks(self) -> tuple[int, int]:
        """Number of this process, and of all."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @property
    def fingerprint(self) -> str:
        """Hash of the training data that is the same on every machine."""
        self.load()
        return self._fingerprint

    def steps_per_epoch(self, world_size: int = 1, accumulate: int = 1) -> int:
        """Optimiser steps in an epoch, of ``accumulate`` batches each, by arithmetic: no loader is built.

        ``trainer.limit_train_batches`` is taken into account when the data module belongs to a trainer.
        """
        if self.reading.streaming:
            batches = self._stream_steps()
        else:
            batches = sampling.epoch_batches(self.split_sizes.get("train", 0), self.batch_size, world_size)
            limit = self.trainer.limit_train_batches if self.trainer is not None else 1.0
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return -(-batches // accumulate)

    def _stream_steps(self) -> int:
        steps = self.trainer.limit_train_batches if self.trainer is not None else None
        return sampling.check_stream(self.load().num_shards, self._ranks[1], self._workers(), steps)

    @property
    def preprocessing(self) -> Preprocessing:
        """How evaluation pictures are prepared; what is saved with the weights says the same."""
        self.load()  # measures mean="dataset"
        return Preprocessing(
            self.image_size,
            None if self.pixels.resize_mode == "squash" else short_side(self.image_size, self.pixels.crop_pct),
            tuple(float(value) for value in self.mean),
            tuple(float(value) for value in self.std),
            self.pixels.interpolation,
            tuple(self.pixels.background),
            self.grey_maximum or GREY_MAXIMUM,
        )

    def image_processor(self) -> BaseImageProcessor:
        """The image processor to save with the weights: same pixels as this module's evaluation batches."""
        return self.preprocessing.processor()

    def facts(self) -> DataFacts:
        """What a model card should know about the data, without absolute paths."""
        name, files = _shareable(self.dataset), flat(self.data_dir or self.data_files)
        is_hub_id = not files and name.count("/") == 1 and not Path(name).exists()
        if files:  # a format, such as parquet: named after its folder
            path = Path(_shareable(files[0]))
            name = (path.parent.name if path.suffix else path.name) or name
        splits = {split: SplitFacts(size) for split, size in self.split_sizes.items()}
        if "train" in splits:
            splits["train"].classes = self.class_counts
        return DataFacts(
            name=name.removeprefix("swin_hf:"),
            fingerprint=self.reading.revision or self.fingerprint,
            splits=splits,
            config=self.reading.config_name,
            is_hub_id=is_hub_id,
            unreadable=len(self._unreadable),
        )

    # Lightning's hooks, in the order in which they run.

    def prepare_data(self) -> None:
        """Download once per node."""
        self.load()

    def setup(self, stage: str) -> None:
        """Check how the processes were started, print the class table and record the held-out rows."""
        source, trainer = self.load(), self.trainer
        if trainer is not None:
            sampling.check_launch(trainer)
        if stage != "fit":
            return
        if "train" not in source.splits:
            raise ValueError(
                f"{self.dataset!r} has no training split, only {sorted(source.splits)}; give one to train on (the files"
                " of each split in data_files), or measure a checkpoint on these pictures with test or validate"
            )
        if self.reading.streaming:
            self._stream_steps()
        if not self._announced:
            self.announce()
            self._announced = True
        if trainer is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = trainer.log_dir  # asked for by every rank: Lightning broadcasts it
            is_own = folder is not None and (trainer.logger is not None or Path(folder).resolve() != Path.cwd())
            if is_own and trainer.is_global_zero:
                self.save_split(str(folder))

    def save_split(self, folder: str | Path) -> None:
        """Write ``split.json``: which rows of the stored training split were held out, and how to draw them again."""
        self.load()
        if not self._held_out:
            return
        record = {
            "dataset": _shareable(self.dataset),
            "fingerprint": self.fingerprint,
            "split_seed": self.splits.seed,
            **{name: self._rows[name].tolist() for name in self._held_out},
        }
        with replacing(Path(folder, "split.json")) as partial:
            partial.write_text(json.dumps(record) + "\n")

    # What a task replaces.

    def announce(self) -> None:
        """Say what was found."""
        source = self.load()
        if source.label_column is not None and not self.reading.streaming:
            announce_classes(source, {name: source.counts(self._labels[name]) for name in self.split_sizes})

    def find_source(self) -> sources.Source:
        """Load the dataset and find its columns and classes."""
        return sources.load_source(self.dataset, self.data_files, self.data_dir, self.reading, self.source_class)

    def train_transform(self) -> Callable[..., Any]:
        """From a decoded training picture to ``(C, H, W)`` of its type, at random."""
        self.load()  # for mean="dataset"
        fill = [round(255 * value) for value in self.mean if isinstance(value, float)]
        return random_transform(self.image_size, self.augmentation, self.pixels.interpolation, fill)

    def eval_transform(self) -> Callable[..., Any]:
        """From a decoded picture of validation, test or prediction to ``(C, H, W)`` of its type."""
        return self.preprocessing.pixels

    def reader(self, split: str, transform: Callable[..., Any]) -> PictureReader:
        """How the rows of a stored split become samples."""
        return PictureReader(self.load(), split, transform, self.decoder(decode_pixels), self.reading.on_error)

    def decoder(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        """A decoder of :mod:`swin_hf.processing` that knows what the values of a picture mean."""
        return partial(
            decode,
            num_channels=self.num_channels,
            background=tuple(self.pixels.background),
            grey_maximum=self.grey_maximum or GREY_MAXIMUM,
        )

    # The loaders.

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training split, from where a restored run stopped."""
        trainer = self.trainer
        if trainer is not None:
            if self._restored is not None:
                sampling.check_restored(trainer, self._restored, self._state(), self.batch_size)
                self._restored = None
            sampling.rewind_to_optimizer_step(trainer)
        options = self._loader_options("train", self.batch_size)
        options["position"] = None if trainer is None else partial(sampling.training_position, trainer)
        data = self._samples("train", self.train_transform())
        if isinstance(data, PictureStream):
            return sampling.ResumableLoader(data, steps=self._stream_steps(), **options)
        classes = self._labels["train"] if self.splits.balanced_sampling else None
        sampler = sampling.EpochSampler(len(data), self.batch_size, self.seed, *self._ranks, classes)
        options["batch_size"] = min(self.batch_size, sampler.num_samples)
        return sampling.ResumableLoader(data, sampler=sampler, drop_last=True, **options)

    def val_dataloader(self) -> Any:
        """Batches of the validation split, each picture once; a training without one has an empty list."""
        is_asked = self.trainer is not None and self.trainer.state.fn == "validate"
        return self._eval_loader("validation") if is_asked or self.has("validation") else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, each picture once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, or of the validation split if there is none."""
        return self._eval_loader("test" if self.has("test") else "validation")

    def _eval_loader(self, name: str) -> DataLoader[Any]:
        if not self.has(name):
            raise ValueError(
                f"{self.dataset!r} has no {name} split with labels (found {sorted(self.load().splits)}); name its files"
                f" in data_files, or hold out a share with {name}_fraction before training"
            )
        (rank, world_size), data = self._ranks, self._samples(name, self.eval_transform())
        options = self._loader_options(name, self.eval_batch_size)
        if isinstance(data, PictureStream):
            return DataLoader(data, **options)
        if len(data) < world_size:
            raise ValueError(f"{len(data)} pictures of split {name!r} for {world_size} ranks; use fewer devices")
        sampler = UnrepeatedDistributedSampler(data, num_replicas=world_size, rank=rank, shuffle=False)
        return DataLoader(data, sampler=sampler, **options)

    def _samples(self, name: str, transform: Callable[..., Any]) -> PictureDataset | PictureStream:
        source, (rank, world_size), training, named = self.load(), self._ranks, name == "train", name == "test"
        stored = name if self.reading.streaming or name in source.splits else "train"  # held out of the training split
        reader = self.reader(stored, transform)
        data: Any = source.splits[stored]
        if not self.reading.streaming:
            labels = self._labels[name] if source.label_column is not None else None
            return PictureDataset(data, self._rows[name], labels, reader, self.seed, training, named)
        data = data.select_columns([*reader.columns, *source.label_columns])
        if training:
            data = data.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        data = split_dataset_by_node(data, rank, world_size)
        target = source.target if source.label_columns else None
        if training:
            return PictureStream(data.repeat(None), target, reader, self.seed, rank, self.batch_size)
        return PictureStream(data, target, reader, self.seed, rank, self.eval_batch_size, named)

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if self.trainer is None or self.trainer.strategy.root_device.type == "cpu":
            return 0  # the model needs the cores more
        local = max(1, self.trainer.num_devices)
        workers = min(8, usable_cores() // local)
        return min(workers, self.load().num_shards // self.trainer.world_size) if self.reading.streaming else workers

    def _loader_options(self, name: str, batch_size: int) -> dict[str, Any]:
        workers = self._workers()
        return {
            "batch_size": batch_size,
            "num_workers": workers,
            "collate_fn": self.collate,
            "persistent_workers": workers > 0 and not self.reading.streaming and name != "test",
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Take the names of pictures out of the batch and remember them: all of a test, and the unreadable ones."""
        self.batch_sources = batch.pop("sources", [])
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
            position = sampling.training_position(trainer)
            torch.manual_seed(sampling.derive_seed(self.seed, "pixels", trainer.global_rank, *position))
        pixels = batch.get("pixel_values")
        if pixels is not None and (pixels.dtype == torch.uint8 or self.num_channels not in (None, 1, 3)):
            pixels = normalize(pixels, self.mean, self.std)  # type: ignore[arg-type]
            if training and self.augmentation.erasing > 0:
                erase = v2.RandomErasing(self.augmentation.erasing, value="random", inplace=True)
                for picture in pixels:
                    erase(picture)
            if trainer is not None and trainer.lightning_module is not None:
                pixels = pixels.to(trainer.lightning_module.dtype)
            batch["pixel_values"] = pixels
        return batch

    def share_unreadable(self) -> None:
        """Tell every rank which pictures any of them could not read; all of them call it, at the end of an epoch."""
        self._unreadable = dict(sampling.gathered(list(self._unreadable.items())))

    def teardown(self, stage: str) -> None:
        """Say how many pictures could not be read."""
        if self._unreadable:
            examples = "\n  ".join(list(self._unreadable.values())[:10])
            rank_zero_info(
                f"{len(self._unreadable)} pictures could not be read ({self.reading.on_error}):\n  {examples}"
            )

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """What must not change between an interruption and its resumption.

        A restored state is passed on until it has been compared: a run that is refused saves its state like any other
        that fails, and must not be accepted the next time.
        """
        return self._state() if self._restored is None else self._restored

    def _state(self) -> dict[str, Any]:
        global_batch = self.batch_size * self._ranks[1]
        return {
            "fingerprint": self.fingerprint,
            "train_size": self.split_sizes.get("train"),
            "split_seed": self.splits.seed,
            "seed": self.seed,
            "balanced_sampling": self.splits.balanced_sampling,
            **{name: getattr(self, name) for name in MEASURED},
            "global_batch": global_batch,
            "images_per_step": global_batch * (self.trainer.accumulate_grad_batches if self.trainer is not None else 1),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state of the interrupted run; it is compared when training goes on."""
        self._restored = state_dict


def usable_cores() -> int:
    """Cores that this process may use; macOS does not tell, so there it is all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shareable(name: str) -> str:
    """An absolute path as that below the working directory, or as the name of the file; other names are redacted."""
    path = Path(name)
    if not path.is_absolute():
        return str(redact(name))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
