"""Compare this project's training with transformers' Trainer and timm's loop: same data, batch, model size, precision.

    python -m benchmarks.trainer                                            # digits, offline
    python -m benchmarks.trainer --recipe fashion_mnist --limit 12800 --epochs 3      # time only
    python -m benchmarks.trainer --recipe fashion_mnist --rounds 1                    # the whole recipe, both

Ours is ``SwinHFForImageClassification`` under Lightning with ``ImageDataModule``; theirs is transformers' own Swin
under its Trainer with torchvision transforms in ``with_transform``, as in its image classification example. Both train
the same sizes from the same random weights on the same pictures with AdamW, the same schedule, augmentation, precision
and clipping, without logging or saving, on the CPU. The third side, ``timm``, is its Swin with the same weights in the
loop of its ``train.py``, on ``timm.data.create_loader``. ``python -m benchmarks --sections trainer`` keeps the result.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from lightning.pytorch import Callback, Trainer, seed_everything
from torchvision.transforms import v2
from transformers import SwinConfig, SwinForImageClassification, TrainerCallback, TrainingArguments
from transformers import Trainer as TheirTrainer

from swin_hf import SwinHFForImageClassification
from swin_hf.training import (
    Augmentation,
    ImageDataModule,
    Mixing,
    Network,
    Optimization,
    Pixels,
    Reading,
    Splits,
    SwinClassifier,
)

from .peers import build_peer
from .pipeline import quiet

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Recipe:
    """What all sides train: the values of ``swin_hf/training/configs``, where transformers can run them."""

    folder: Path  # with train.parquet and test.parquet, or train/CLASS/*.jpg and test/CLASS/*.jpg
    sizes: dict[str, Any]  # fields that SwinConfig and SwinHFConfig share
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch: int
    epochs: int
    rate: float
    smoothing: float
    crop_padding: int | None  # None for a random resized crop
    hflip: float
    precision: str = "32-true"
    limit: int | None = None
    workers: int = 0  # loader processes of each side


RECIPES = {
    "digits": Recipe(
        ROOT / "swin_hf" / "training" / "configs" / "digits",
        {
            "image_size": 32, "patch_size": 4, "num_channels": 3, "embed_dim": 48, "depths": [2, 2],
            "num_heads": [3, 6], "window_size": 4, "drop_path_rate": 0.1, "encoder_stride": 8,
            "initializer_range": 0.1,
        },
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), batch=32, epochs=30, rate=2e-3, smoothing=0.1,
        crop_padding=2, hflip=0.0,
    ),
    "fashion_mnist": Recipe(
        ROOT / "recipes" / "data" / "fashion_mnist",
        {
            # Not the recipe's 28 pixels and windows of 7: the last map is 4x4, and transformers fails on it.
            "image_size": 32, "patch_size": 2, "num_channels": 1, "embed_dim": 32, "depths": [1, 2, 2],
            "num_heads": [1, 2, 4], "window_size": 4, "drop_path_rate": 0.05, "encoder_stride": 8,
            "initializer_range": 0.1,
        },
        (0.286,), (0.353,), batch=64, epochs=26, rate=1.5e-3, smoothing=0.05, crop_padding=1, hflip=0.5,
        precision="bf16-mixed",
    ),
    "jpeg_folder": Recipe(
        ROOT, {"image_size": 224},  # the sizes of swin_tiny are SwinConfig's own
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), batch=32, epochs=1, rate=1e-4, smoothing=0.1,
        crop_padding=None, hflip=0.5,
    ),
}  # fmt: skip


class Clock(Callback):
    """Seconds of each training epoch of ours."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.start)


class TheirClock(TrainerCallback):
    """Seconds of each training epoch of theirs."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, *_: object, **__: object) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_epoch_end(self, *_: object, **__: object) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.start)


def place(recipe: Recipe) -> dict[str, Any]:
    """Where the pictures are, for ``load_dataset`` and :class:`ImageDataModule`."""
    found = {split: recipe.folder / f"{split}.parquet" for split in ("train", "test")}
    if all(path.is_file() for path in found.values()):
        return {"data_files": {split: str(path) for split, path in found.items()}}
    if not (recipe.folder / "train").is_dir():
        raise SystemExit(f"error: {found['train']} does not exist; run the script in its folder, which makes it")
    return {"data_dir": str(recipe.folder)}


def read(recipe: Recipe, seed: int) -> tuple[Any, Any]:
    """Training and test rows, for the other sides."""
    where = place(recipe)
    data = load_dataset("imagefolder" if "data_dir" in where else "parquet", **where)
    rows = data["train"]
    return rows.shuffle(seed=seed).select(range(recipe.limit)) if recipe.limit else rows, data["test"]


def new_model(recipe: Recipe, seed: int) -> SwinForImageClassification:
    """The random weights, of transformers' own initialisation, that both sides start from."""
    seed_everything(seed, verbose=False)
    return SwinForImageClassification(SwinConfig(**recipe.sizes, num_labels=10))


def train_ours(recipe: Recipe, seed: int) -> tuple[list[float], float]:
    """Seconds per epoch and test accuracy of this project."""
    where = place(recipe)
    crop = {} if recipe.crop_padding is None else {"crop_padding": recipe.crop_padding}
    data = ImageDataModule(
        "imagefolder" if "data_dir" in where else "parquet", **where, batch_size=recipe.batch, eval_batch_size=256,
        image_size=recipe.sizes["image_size"], num_channels=len(recipe.mean), reading=Reading(seed=seed),
        num_workers=recipe.workers,
        splits=Splits(validation_fraction=0.0, limit_train=recipe.limit),
        augmentation=Augmentation(**crop, hflip=recipe.hflip),
        pixels=Pixels(mean=list(recipe.mean), std=list(recipe.std), resize_mode="squash"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        new_model(recipe, seed).save_pretrained(folder)
        module = SwinClassifier(
            weights=folder, num_labels=10, network=Network(drop_path_rate=recipe.sizes.get("drop_path_rate", 0.1)),
            optimization=Optimization(recipe.rate, lr_scaling=False, warmup_epochs=1, warmup_lr=0.0, min_lr=0.0),
            mixing=Mixing(label_smoothing=recipe.smoothing),
        )  # fmt: skip
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", max_epochs=recipe.epochs, gradient_clip_val=5.0, callbacks=[clock], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, precision=recipe.precision,
    )  # fmt: skip
    trainer.fit(module, data)
    return clock.seconds, trainer.test(module, data, verbose=False)[0]["test_accuracy"]


def transforms(recipe: Recipe) -> tuple[v2.Compose, v2.Compose]:
    """Transforms of training and test, from a PIL image to normalised pixels, with torchvision."""
    side, bicubic = recipe.sizes["image_size"], v2.InterpolationMode.BICUBIC
    colour = v2.RGB() if len(recipe.mean) == 3 else v2.Grayscale()
    resize = v2.Resize((side, side), interpolation=bicubic)
    tail = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(recipe.mean, recipe.std)]
    flip = [v2.RandomHorizontalFlip(recipe.hflip)] if recipe.hflip else []
    if recipe.crop_padding is None:
        crop = [v2.RandomResizedCrop(side, interpolation=bicubic)]
    else:
        crop = [resize, v2.RandomCrop(side, padding=recipe.crop_padding)]
    return v2.Compose([colour, *crop, *flip, *tail]), v2.Compose([colour, resize, *tail])


def train_theirs(recipe: Recipe, seed: int) -> tuple[list[float], float]:
    """Seconds per epoch and test accuracy of transformers' Swin under its Trainer."""
    model = new_model(recipe, seed)
    augment, plain = transforms(recipe)

    def to_batch(transform: v2.Compose):
        return lambda rows: {"pixel_values": [transform(image) for image in rows["image"]], "labels": rows["label"]}

    train, test = read(recipe, seed)
    train, test = train.with_transform(to_batch(augment)), test.with_transform(to_batch(plain))
    clock = TheirClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=recipe.batch, per_device_eval_batch_size=256,
            num_train_epochs=recipe.epochs, learning_rate=recipe.rate, weight_decay=0.05, lr_scheduler_type="cosine",
            warmup_steps=len(train) // recipe.batch, max_grad_norm=5.0, label_smoothing_factor=recipe.smoothing,
            remove_unused_columns=False, use_cpu=True, bf16=recipe.precision == "bf16-mixed", seed=seed,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_drop_last=True,
            dataloader_pin_memory=False, dataloader_num_workers=recipe.workers,
        )  # fmt: skip
        trainer = TheirTrainer(
            model, arguments, train_dataset=train, callbacks=[clock],
            data_collator=lambda rows: {
                "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
                "labels": torch.tensor([row["labels"] for row in rows]),
            },
        )  # fmt: skip
        trainer.train()
        arguments.dataloader_drop_last = False  # it counts for tests too
        output = trainer.predict(test)
    return clock.seconds, float((output.predictions.argmax(-1) == output.label_ids).mean())


class Rows(torch.utils.data.Dataset):
    """Rows of ``datasets`` as timm's loader wants them: pairs, after a transform that it sets."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.transform = rows, None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.rows[index]
        picture = row["image"]
        return self.transform(picture) if self.transform is not None else picture, row["label"]


def timm_loader(recipe: Recipe, rows: Any, training: bool) -> Any:
    """The loader of timm with its own transforms; of a padded crop, which it has not, with torchvision's."""
    from timm.data import create_loader

    side, augment = recipe.sizes["image_size"], transforms(recipe)[0 if training else 1]
    loader = create_loader(
        Rows(rows), (len(recipe.mean), side, side), recipe.batch if training else 256, is_training=training,
        scale=(0.08, 1.0), hflip=recipe.hflip, color_jitter=0.0, interpolation="bicubic", mean=recipe.mean,
        std=recipe.std, num_workers=recipe.workers, use_prefetcher=False, persistent_workers=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    if recipe.crop_padding is not None or not training:
        loader.dataset.transform = augment
    return loader


def train_timm(recipe: Recipe, seed: int) -> tuple[list[float], float]:
    """Seconds per epoch and test accuracy of timm's Swin in the steps of its ``train.py``."""
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import AverageMeter, accuracy, dispatch_clip_grad

    with tempfile.TemporaryDirectory() as folder:
        new_model(recipe, seed).save_pretrained(folder)
        model = build_peer("timm", SwinHFForImageClassification.from_pretrained(folder)).train()
    train, test = (timm_loader(recipe, rows, number == 0) for number, rows in enumerate(read(recipe, seed)))
    optimizer = create_optimizer_v2(model, "adamw", lr=recipe.rate, weight_decay=0.05)
    steps = len(train)
    schedule = CosineLRScheduler(
        optimizer, recipe.epochs * steps, warmup_t=steps if recipe.epochs > 1 else 0, t_in_epochs=False
    )
    lossy = LabelSmoothingCrossEntropy(recipe.smoothing)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16-mixed")
    seconds, updates = [], 0
    for _ in range(recipe.epochs):
        start, losses = time.perf_counter(), AverageMeter()
        for images, labels in train:
            with autocast:
                loss = lossy(model(images), labels)
            loss.backward()
            dispatch_clip_grad(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.update(loss.item(), len(images))
            updates += 1
            schedule.step_update(updates, metric=losses.avg)
        seconds.append(time.perf_counter() - start)
    right = AverageMeter()
    model.eval()
    with torch.inference_mode(), autocast:
        for images, labels in test:
            right.update(float(accuracy(model(images), labels)[0]) / 100, len(images))
    return seconds, right.avg


SIDES = {"swin_hf": train_ours, "transformers": train_theirs, "timm": train_timm}
PAIR = ("swin_hf", "transformers")


def compare(recipe: Recipe, rounds: int, names: Sequence[str] = PAIR) -> list[dict[str, Any]]:
    """Alternate the sides, one seed a round, and summarise each; the first epoch of a round warms up.

    Args:
        recipe: What to train.
        rounds: How often each side trains.
        names: Sides, of ``SIDES``.

    Returns:
        One row for each side; ``ours_is_faster_by`` divides the fastest epochs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    accuracies: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(rounds):
        for name in names:
            with quiet():
                times, accuracy = SIDES[name](recipe, seed)
            seconds[name] += times[1:] or times
            accuracies[name].append(accuracy)
    return [
        {
            "name": name,
            "median_epoch_s": round(statistics.median(seconds[name]), 3),
            "min_epoch_s": round(min(seconds[name]), 3),
            "ours_is_faster_by": round(min(seconds[name]) / min(seconds[names[0]]), 3),
            "test_accuracy": round(statistics.mean(accuracies[name]), 4),
        }
        for name in names
    ]


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, default="digits")
    parser.add_argument("--folder", type=Path, help="where train.parquet and test.parquet are")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--limit", type=int, help="train on so many pictures only")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--only", choices=SIDES, help="one side, to run it at the same time as the other, each on its own core"
    )
    options = parser.parse_args()
    changes = {"folder": options.folder, "epochs": options.epochs, "limit": options.limit}
    recipe = replace(RECIPES[options.recipe], **{name: value for name, value in changes.items() if value is not None})
    for row in compare(recipe, options.rounds, [options.only] if options.only else PAIR):
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
