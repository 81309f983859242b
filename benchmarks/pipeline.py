"""From files to batches, and a whole epoch from files to trained weights, against the loaders and loops of others."""

import argparse
import contextlib
import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import datasets
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from swin_hf import processing
from swin_hf.training import ImageDataModule, Reading
from swin_hf.training.data import prepare

PICTURES = "JPEG, 500x375, quality 90"
ROUNDS = 5


def make_jpegs(folder: Path, count: int, classes: int = 4) -> None:
    """Write smooth random pictures of 500x375 pixels as ``FOLDER/CLASS/NUMBER.jpg``."""
    for number in range(count):
        path = folder / f"class{number % classes}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = F.interpolate(torch.rand(1, 3, 47, 63) * 255, (375, 500), mode="bicubic")[0]
        v2.functional.to_pil_image(picture.clamp(0, 255).byte()).save(path, quality=90)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and notices of a trainer and its data."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def one_core(workers: int) -> Iterator[None]:
    """Without workers, compute with one thread, as a worker does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if workers else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def our_loader(dataset: str, workers: int, **place: Any) -> DataLoader[Any]:
    """Training batches of this project."""
    data = ImageDataModule(
        dataset, image_size=224, batch_size=32, num_workers=workers, reading=Reading(seed=0), **place
    )
    with quiet():
        data.prepare_data()
        data.setup("fit")
    return data.train_dataloader()


def their_loader(folder: Path, workers: int) -> DataLoader[Any]:
    """Training batches of torchvision alone, as its reference scripts make them."""
    steps = [v2.PILToTensor(), v2.RandomResizedCrop(224, (0.08, 1.0), antialias=True, interpolation=3)]
    steps += [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    steps += [v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    pictures = torchvision.datasets.ImageFolder(folder, v2.Compose(steps))
    return DataLoader(pictures, batch_size=32, shuffle=True, num_workers=workers, drop_last=True)


def read_all(make: Callable[[], DataLoader[Any]]) -> tuple[float, float]:
    """Images per second of an epoch after its first batch, and the seconds until that one."""
    start = time.perf_counter()
    batches = iter(make())
    next(batches)
    first = time.perf_counter() - start
    start, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch["pixel_values"] if isinstance(batch, dict) else batch[0])
    return count / (time.perf_counter() - start), first


def measure_pipeline(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Images per second from JPEG files to training batches, of one core or of all workers, and the first batch.

    Each decoder reads the files and what ``swin-hf prepare`` makes of them; all take turns.
    """
    workers, left_out = options.workers, {}
    decoders = {"Pillow": None, "torchcodec": processing.jpeg_decoder()}
    if decoders["torchcodec"] is None:
        left_out["swin_hf, torchcodec"] = "it is not installed; pip install 'swin-hf[decode]' adds it"
        del decoders["torchcodec"]
    with TemporaryDirectory() as place, mock.patch.object(datasets.config, "HF_DATASETS_CACHE", Path(place, "cache")):
        files, prepared = Path(place, "files"), Path(place, "prepared")
        make_jpegs(files / "train", options.pictures)
        prepare(str(files), prepared)
        calls: dict[str, tuple[Any, Callable[[], DataLoader[Any]]]] = {}
        for name, decoder in decoders.items():
            calls[f"swin_hf, {name}"] = (decoder, lambda: our_loader("imagefolder", workers, data_dir=str(files)))
            calls[f"swin_hf, {name}, prepared"] = (decoder, lambda: our_loader(str(prepared), workers))
        calls["torchvision"] = (None, lambda: their_loader(files / "train", workers))
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        with one_core(workers):
            for _ in range(ROUNDS):
                for name, (decoder, make) in calls.items():
                    with mock.patch.object(processing, "jpeg_decoder", lambda decoder=decoder: decoder):
                        found[name].append(read_all(make))
    best = {name: max(rate for rate, _ in rounds) for name, rounds in found.items()}
    rows = [
        {
            "name": name,
            "images_per_s": round(best[name], 1),
            "first_batch_s": round(min(first for _, first in rounds), 3),
            "times_torchvision": round(best[name] / best["torchvision"], 2),
        }
        for name, rounds in found.items()
    ]
    return {"rows": rows, "left_out": left_out, "pictures": PICTURES, "workers": workers}


def make_fashion(folder: Path, count: int) -> None:
    """Write random pictures of the shape of Fashion-MNIST, 28x28 and grey, of 10 classes, as it is stored."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(number) for number in range(10)])}
    )
    folder.mkdir(parents=True)
    for split, size in (("train", count), ("test", 500)):
        pixels = torch.randint(256, (size, 28, 28), dtype=torch.uint8)
        rows = {"image": [v2.functional.to_pil_image(one) for one in pixels], "label": [n % 10 for n in range(size)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def measure_epoch(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an epoch from stored pictures, against transformers' Trainer and timm's loop; see ``trainer.py``."""
    from .trainer import RECIPES, compare

    recipe, count, note = RECIPES[setting["data"]], setting["pictures"], ""
    with TemporaryDirectory() as place, mock.patch.object(datasets.config, "HF_DATASETS_CACHE", Path(place, "cache")):
        folder = Path(place, "data")
        if setting["data"] == "jpeg_folder":
            make_jpegs(folder / "train", count, classes=10)
            make_jpegs(folder / "test", 40, classes=10)
            note = f"random pictures, {PICTURES}"
        elif (recipe.folder / "train.parquet").is_file():
            folder = recipe.folder
        else:
            make_fashion(folder, count)
            note = "random pictures of its shape"
        how = {"epochs": setting["epochs"], "workers": setting["workers"]}
        chosen = dataclasses.replace(recipe, folder=folder, limit=count, **how)
        rows = compare(chosen, setting["rounds"], ("swin_hf", "transformers", "timm"))
    for row in rows:
        row["name"] += f" ({note})" if note else ""
        row["images_per_s"] = round(count // chosen.batch * chosen.batch / row["min_epoch_s"], 1)
    return {"rows": rows, "left_out": {}}
