"""Compare an epoch of this project's training with an epoch of transformers' Trainer: same data, batch, model size.

    python recipes/compare_trainer.py                       # digits, offline
    python recipes/compare_trainer.py --epochs 12 --rounds 3

Ours is ``SwinHFForImageClassification`` under Lightning with ``ImageDataModule``; theirs is transformers' own Swin
under its Trainer with torchvision transforms in ``with_transform``, as in its image classification example. Both train
the same sizes from random weights on the same pictures with AdamW, the same schedule, augmentation, precision (fp32)
and clipping, without logging or saving. The rounds alternate; the median epoch time, without the first, is reported.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import load_dataset
from lightning.pytorch import Callback, Trainer, seed_everything
from torchvision.transforms import v2
from transformers import SwinConfig, SwinForImageClassification, TrainerCallback, TrainingArguments
from transformers import Trainer as TheirTrainer

from swin_hf.training import ImageDataModule, SwinClassifier

DIGITS = Path(__file__).parent / "data" / "digits"
FILES = {"train": str(DIGITS / "train.parquet"), "test": str(DIGITS / "test.parquet")}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE, DECAY, SMOOTHING, INITIAL = 2e-3, 0.05, 0.1, 0.1


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


def train_ours(epochs: int, batch: int, seed: int) -> tuple[list[float], float]:
    """Seconds per epoch and test accuracy of this project."""
    seed_everything(seed, verbose=False)
    data = ImageDataModule(
        "parquet", FILES, batch_size=batch, eval_batch_size=64, validation_fraction=0.0, crop_padding=2, hflip=0.0,
        resize_mode="squash", seed=seed,
    )  # fmt: skip
    module = SwinClassifier(
        "swin_digits_patch4_window4_32", num_labels=10, overrides={"initializer_range": INITIAL}, learning_rate=RATE,
        lr_scaling=False, weight_decay=DECAY, warmup_epochs=1, warmup_lr=0.0, min_lr=0.0, label_smoothing=SMOOTHING,
    )  # fmt: skip
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, gradient_clip_val=5.0, callbacks=[clock], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return clock.seconds, trainer.test(module, data, verbose=False)[0]["test_accuracy"]


def train_theirs(epochs: int, batch: int, seed: int) -> tuple[list[float], float]:
    """Seconds per epoch and test accuracy of transformers' Swin under its Trainer."""
    seed_everything(seed, verbose=False)
    tail = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    resize = v2.Resize((32, 32), interpolation=v2.InterpolationMode.BICUBIC)
    augment = v2.Compose([v2.RGB(), resize, v2.RandomCrop(32, padding=2), *tail])
    plain = v2.Compose([v2.RGB(), resize, *tail])

    def to_batch(transform: v2.Compose):
        return lambda rows: {"pixel_values": [transform(image) for image in rows["image"]], "labels": rows["label"]}

    data = load_dataset("parquet", data_files=FILES)
    train, test = data["train"].with_transform(to_batch(augment)), data["test"].with_transform(to_batch(plain))
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=48, depths=[2, 2], num_heads=[3, 6], window_size=4, num_labels=10,
        drop_path_rate=0.1, initializer_range=INITIAL,
    )  # fmt: skip
    clock = TheirClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=batch, per_device_eval_batch_size=64, num_train_epochs=epochs,
            learning_rate=RATE, weight_decay=DECAY, lr_scheduler_type="cosine", warmup_steps=len(train) // batch,
            max_grad_norm=5.0, label_smoothing_factor=SMOOTHING, remove_unused_columns=False, use_cpu=True, seed=seed,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_drop_last=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = TheirTrainer(
            SwinForImageClassification(config), arguments, train_dataset=train, callbacks=[clock],
            data_collator=lambda rows: {
                "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
                "labels": torch.tensor([row["labels"] for row in rows]),
            },
        )  # fmt: skip
        trainer.train()
        output = trainer.predict(test)
    return clock.seconds, float((output.predictions.argmax(-1) == output.label_ids).mean())


def main() -> None:
    """Alternate both and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    accuracies: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(arguments.rounds):
        for name, train in (("ours", train_ours), ("theirs", train_theirs)):
            times, accuracy = train(arguments.epochs, arguments.batch, seed)
            seconds[name] += times[1:]
            accuracies[name].append(accuracy)
            median = statistics.median(times[1:])
            print(f"round {seed + 1}, {name}: {median:.3f} s an epoch, accuracy {accuracy:.4f}", flush=True)
    ours, theirs = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
    print(f"ours   {ours:.3f} s an epoch, test accuracy {statistics.mean(accuracies['ours']):.4f}")
    print(f"theirs {theirs:.3f} s an epoch, test accuracy {statistics.mean(accuracies['theirs']):.4f}")
    print(f"ratio  {ours / theirs:.3f}   ({torch.get_num_threads()} threads, {arguments.rounds} rounds)")


if __name__ == "__main__":
    main()
