"""What happens around the training: averages, checkpoints, guards, reports, and the folder that a run leaves."""

# mypy: disable-error-code="attr-defined"
# Lightning sets attributes of its Trainer dynamically and re-exports names without saying so.

import copy
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor

from swin_hf.hub.facts import ClassScore, ConfusionMatrix, DataFacts, Metric, SplitFacts, TrainingFacts

from .figures import draw_confusion, draw_curves, draw_pictures, to_pixels

LIBRARIES = ("torch", "torchvision", "transformers", "lightning", "datasets", "torchmetrics", "safetensors")


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step."""


class EMA(WeightAveraging):
    """Exponential moving average of the weights; the average is what is validated, saved and pushed.

    Buffers are copied, never averaged: an average of integers (Swin's index tables in other libraries) is garbage.

    Args:
        decay: Share of the old average kept at each update, in (0, 1).
        warmup: Begin with a small decay, ``(1 + n) / (10 + n)`` after ``n`` updates, so that short runs are not
            dominated by their random start.
        every_n_steps: Optimiser steps between two updates.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True, every_n_steps: int = 1) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay is {decay}; the share of the old average kept at each update is in (0, 1)")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; it must be 1 or more")
        self.decay = decay
        self.warmup = warmup
        self.every_n_steps = every_n_steps
        self.swapped = False  # whether the module has the average and the average model the current weights
        super().__init__(use_buffers=False, multi_avg_fn=self.average)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make room for the average.

        Raises:
            ValueError: If weights have 16 bits, in which an average of many steps never moves.
        """
        if stage == "fit" and trainer.precision in ("16-true", "bf16-true"):
            raise ValueError(
                f"EMA of 16-bit weights (trainer.precision {trainer.precision}) never moves: a step of it is smaller "
                "than they can hold; use trainer.precision bf16-mixed, whose weights are float32"
            )
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both sets of weights to go on training; what is tested is the average, which is loaded already."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo the swap of an interrupted validation, before the state is saved."""
        if self.swapped:
            self._swap_models(pl_module)

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self.swapped = not self.swapped

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every ``every_n_steps``-th optimiser step."""
        return step_idx is not None and (step_idx + 1) % self.every_n_steps == 0

    @torch.no_grad()
    def average(self, averages: list[Tensor], currents: list[Tensor], updates: Tensor | int) -> None:
        """Move the averages towards the current weights, in place and without waiting for the device."""
        updates = torch.as_tensor(updates, device=averages[0].device)
        decay = torch.full_like(updates, self.decay, dtype=averages[0].dtype)
        if self.warmup:
            decay = torch.minimum(decay, (1 + updates) / (10 + updates))
        steps = torch._foreach_sub(currents, averages)
        torch._foreach_mul_(steps, 1 - decay)
        torch._foreach_add_(averages, steps)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it when it is complete and on the disk.

    Lightning's own goes through the folder of temporary files. From another file system than the run's, the last step
    is a copy, which a full disk or a kill leaves half done in place of the previous checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file, or leave everything as it was.

        Raises:
            OSError: If it cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


class AtomicCheckpoint(ModelCheckpoint):
    """A checkpoint whose file is replaced when its successor is complete."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write through :class:`AtomicCheckpointIO`, unless the strategy has a way of its own."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()


class LastCheckpoint(AtomicCheckpoint):
    """Keeps ``last.ckpt``, the whole state of the run, at every epoch and when the run is interrupted.

    A file is replaced when its successor is complete; a full disk leaves the old one. After a loss that is not finite
    nothing is saved, so that the last good state stays.

    Args:
        dirpath: Folder of the checkpoints.
        every_n_train_steps: Optimiser steps between two checkpoints, instead of one per epoch.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=self.CHECKPOINT_NAME_LAST,
            monitor=None,
            save_top_k=1,
            save_on_exception=True,
            save_on_train_epoch_end=None if every_n_train_steps else True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state, unless it is broken or cannot be written."""
        if not isinstance(exception, NonFiniteLossError | OSError):
            super().on_exception(trainer, pl_module, exception)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in this folder; in another, there is nothing to go on with."""
        if str(self.dirpath) == str(state_dict["dirpath"]):
            super().load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have a validation that was interrupted done again; Lightning takes it for complete."""
        if trainer.state.fn != "fit":
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        if progress["total"]["ready"] > 0 and not progress["is_last_batch"]:
            for tracker in ("total", "current"):  # in the middle of its first batch
                progress[tracker].update(ready=1, started=1, processed=0, completed=0)


class BestCheckpoint(AtomicCheckpoint):
    """Keeps ``best.ckpt``, the state with the best validation metric.

    Args:
        dirpath: Folder of the checkpoints.
        monitor: Name of the metric.
        mode: ``max`` or ``min``.
    """

    def __init__(self, dirpath: str | None = None, monitor: str = "val_accuracy", mode: str = "max") -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best so far, also in another folder: that of another run, or this one after it was moved."""
        score, there = state_dict["best_model_score"], Path(state_dict["best_model_path"] or "nothing")
        if score is not None and self.dirpath is not None and str(self.dirpath) != str(state_dict["dirpath"]):
            here = Path(self.dirpath) / "best.ckpt"
            if not here.is_file() and there.is_file():
                copy_file(there, here)
            if here.is_file() or there.is_file():
                kept = str(here)
                moved = {"dirpath": self.dirpath, "best_model_path": kept, "kth_best_model_path": kept}
                state_dict = {**state_dict, **moved, "best_k_models": {kept: score}}
        super().load_state_dict(state_dict)


@rank_zero_only
def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, partial)
    partial.replace(target)


class NonFiniteGuard(Callback):
    """Stops a run whose loss or weights are NaN or infinite, and keeps such weights out of every checkpoint.

    The loss stays on the device; it is looked at every ``every_n_steps`` batches and before anything is saved, when the
    weights are looked at too: the last step before it may have spoilt them after a loss that was finite.

    Args:
        every_n_steps: Batches between two looks; each waits for the device.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.first_bad: Tensor | None = None  # global step, -1 while all is well

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run."""
        self.first_bad = torch.full((), -1, dtype=torch.long, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the first step with a bad loss; look at the note now and then."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None or self.first_bad is None:
            return
        bad = ~torch.isfinite(loss.detach()).all() & (self.first_bad < 0)
        self.first_bad = torch.where(bad, trainer.global_step, self.first_bad)
        if (batch_idx + 1) % self.every_n_steps == 0:
            self.look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before the metrics can choose these weights."""
        self.look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before the epoch's checkpoint."""
        self.look(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look before anything is written."""
        self.look(trainer, pl_module)

    def look(self, trainer: Trainer, pl_module: LightningModule | None = None) -> None:
        """Raise on every process when any of them has met a bad loss, or has bad weights in a module that is given.

        Raises:
            NonFiniteLossError: Names the step, and the checkpoint to go back to.
        """
        if self.first_bad is None:
            return
        what, first_bad = "loss is not finite at", self.first_bad.clone()
        step = int(trainer.strategy.reduce(first_bad, reduce_op="max"))
        if step < 0 and pl_module is not None:
            what = "weights are not finite after"
            norms = torch.stack(torch._foreach_norm([p.detach().float() for p in pl_module.parameters()]))
            first_bad = torch.where(torch.isfinite(norms).all(), first_bad, trainer.global_step)
            step = int(trainer.strategy.reduce(first_bad, reduce_op="max"))
        if step < 0:
            return
        self.first_bad = None
        kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint) and c.best_model_path]
        back = f"; the last good state is {kept[0].best_model_path}" if kept else ""
        raise NonFiniteLossError(
            f"the {what} step {step}{back}; lower learning_rate, lengthen the warm-up, "
            "or use trainer.precision bf16-mixed instead of 16-mixed"
        )


class EpochReport(Callback):
    """Prints one line for each epoch and logs the training speed.

    Args:
        enabled: Whether lines are printed; the speed is logged in any case.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.images = 0
        self.started = self.ended = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; an epoch that is resumed in its middle has no other start."""
        self.images = 0
        self.started = self.ended = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images; the last batch stops the clock, before validation."""
        self.images += len(batch["pixel_values"])
        self.ended = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report."""
        seconds = max(self.ended - self.started, 1e-9)
        speed = self.images * trainer.world_size / seconds
        if self.images:  # none where the run was interrupted after them
            pl_module.log("train_images_per_s", speed, rank_zero_only=False, sync_dist=False)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.enabled and trainer.is_global_zero:
            print(self.line(trainer, metrics, speed, seconds), flush=True)  # noqa: T201 - the report

    def line(self, trainer: Trainer, metrics: dict[str, float], speed: float, seconds: float) -> str:
        """The line of an epoch."""
        shown = [
            f"{name} {metrics[name]:.4f}" for name in ("train_loss", "val_loss", "val_accuracy") if name in metrics
        ]
        rate = trainer.optimizers[0].param_groups[-1]["lr"]
        pace = f"  {speed:,.0f} images/s  {seconds:.1f} s" if self.images else ""
        return f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}  {'  '.join(shown)}  lr {rate:.2e}{pace}"


class RunRecord(Callback):
    """Leaves the run's result: ``model/`` with the best weights and their facts, and the figures.

    ``model/`` is what ``save_pretrained`` writes (weights, ``config.json``, ``preprocessor_config.json``) plus
    ``training_facts.json``. It appears complete or not at all.

    Args:
        folder: The run folder; ``None`` prints the report of a test and writes nothing.
        command: Command line of the run, for the record.
        pictures: How many of the worst predicted test pictures are drawn.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, command: str | None = None, pictures: int = 16):
        self.folder = None if folder is None else Path(folder)
        self.command = command
        self.pictures = pictures
        self.curves: dict[str, list[list[float]]] = {}
        self.seconds = 0.0  # spent in fit, over all of its parts
        self.best_step: int | None = None
        self.started: float | None = None
        self.worst: list[dict[str, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """The curves and the time so far travel with the checkpoint."""
        return {"curves": self.curves, "seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self.curves, self.seconds = state_dict["curves"], state_dict["seconds"]

    def elapsed(self) -> float:
        """Seconds spent in fit."""
        return self.seconds + (0.0 if self.started is None else time.monotonic() - self.started)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point to the validation curves."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.add_points(trainer, "val_")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point to the training curves; validation is over by now, so all its pictures have been tried too."""
        trainer.datamodule.share_unreadable()
        self.add_points(trainer, "train_")
        rate = trainer.optimizers[0].param_groups[-1]["lr"]
        self.curves.setdefault("learning_rate", []).append([trainer.global_step, rate])

    def add_points(self, trainer: Trainer, prefix: str) -> None:
        """Add the current metrics whose names begin so."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith(prefix):
                self.curves.setdefault(name, []).append([trainer.global_step, float(value)])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model folder and the learning curves."""
        self.seconds, self.started = self.elapsed(), None
        if self.folder is None or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        self.write_model(trainer, pl_module)
        if self.curves:
            self.keep_figure(trainer, "curves", draw_curves(self.curves))

    def write_model(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``model/`` from the best checkpoint, or from the weights at hand when there is none."""
        assert self.folder is not None
        network: Any = copy.deepcopy(pl_module)
        best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)), None)
        self.best_step = trainer.global_step
        metrics: list[Metric] = []
        if best is not None and best.best_model_path and Path(best.best_model_path).is_file():
            checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True, mmap=True)
            network.load_state_dict(checkpoint["state_dict"])
            self.best_step = int(checkpoint["global_step"])
            metrics = self.metrics_at(self.best_step, trainer)
        facts = self.facts(trainer, pl_module)
        facts.metrics = metrics
        partial, final = self.folder / f".model.{os.getpid()}", self.folder / "model"
        shutil.rmtree(partial, ignore_errors=True)
        exported = network.exportable()
        exported.save_pretrained(partial)
        trainer.datamodule.image_processor().save_pretrained(partial)
        facts.save(partial)
        replace_folder(partial, final)

    def metrics_at(self, step: int, trainer: Trainer) -> list[Metric]:
        """Validation metrics of the epoch that ended at a step."""
        n = trainer.datamodule.split_sizes.get("validation")
        return [
            Metric(name.removeprefix("val_"), value, "validation", n)
            for name, points in self.curves.items()
            for at, value in points
            if name.startswith("val_") and at == step
        ]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the pictures of an earlier test."""
        self.worst = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the pictures with the highest losses."""
        if not isinstance(outputs, dict) or "losses" not in outputs or not self.pictures:
            return
        found = {
            "losses": outputs["losses"],
            "pixel_values": batch["pixel_values"],
            "labels": batch["labels"],
            "predictions": outputs["logits"].argmax(-1),
        }
        self.worst = [keep_worst([*self.worst, found], self.pictures)]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the pictures of all processes."""
        trainer.datamodule.share_unreadable()
        if trainer.world_size == 1:
            return
        mine = [{name: value.cpu() for name, value in part.items()} for part in self.worst]
        everyone: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, mine)
        found = [part for parts in everyone for part in parts]
        self.worst = [keep_worst(found, self.pictures)] if found else []

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the class table; add the test to the facts and draw its figures."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test_")}
        counts = getattr(pl_module, "confusion_counts", None)
        network: Any = pl_module.model
        labels = list(network.config.id2label.values())
        if not trainer.is_global_zero:
            return
        scores = [] if counts is None else class_scores(counts.numpy(), labels)
        print(report(metrics, scores), flush=True)  # noqa: T201 - the report
        if self.folder is None or not (self.folder / "model").is_dir():
            return
        facts = TrainingFacts.load(self.folder / "model")
        n = trainer.datamodule.split_sizes.get("test") if counts is None else int(counts.sum())
        if facts.data is not None:
            facts.data.unreadable = trainer.datamodule.facts()["unreadable"]
        facts.metrics = [m for m in facts.metrics if m.split != "test"]
        facts.metrics += [Metric(name.removeprefix("test_"), value, "test", n) for name, value in metrics.items()]
        if counts is not None:
            facts.metrics.append(Metric("f1_macro", float(np.mean([s.f1 for s in scores])), "test", n))
            facts.per_class = scores
            facts.confusion_matrix = ConfusionMatrix(labels, counts.tolist(), "test")
            self.keep_figure(trainer, "confusion_matrix", draw_confusion(counts.numpy(), labels))
        facts.save(self.folder / "model")
        if self.worst:
            self.keep_figure(trainer, "worst_pictures", self.draw_worst(trainer, labels))

    def draw_worst(self, trainer: Trainer, labels: list[str]) -> Figure:
        """A sheet of the worst predicted pictures."""
        worst = {name: value.cpu() for name, value in self.worst[0].items()}
        pictures = list(to_pictures(worst["pixel_values"], trainer.datamodule))
        captions = [
            f"{labels[label]}, seen as {labels[prediction]}\nloss {loss:.2f}"
            for label, prediction, loss in zip(
                worst["labels"].tolist(), worst["predictions"].tolist(), worst["losses"].tolist(), strict=True
            )
        ]
        return draw_pictures(pictures, captions)

    def keep_figure(self, trainer: Trainer, name: str, figure: Figure) -> None:
        """Write a figure into the run folder and into TensorBoard."""
        assert self.folder is not None
        save_figure(figure, self.folder / f"{name}.png")
        show_figure(trainer, name, figure)

    def facts(self, trainer: Trainer, pl_module: LightningModule) -> TrainingFacts:
        """Everything the card may want to know; nothing secret, no absolute path."""
        source, commit = getattr(pl_module, "starting_point", None), getattr(pl_module, "starting_commit", None)
        speeds = [value for _, value in self.curves.get("train_images_per_s", [])]
        hidden = ("train_images_per_s",)
        return TrainingFacts(
            data=data_facts(trainer.datamodule),
            hyper_parameters=hyper_parameters(trainer, pl_module),
            curves={name: points for name, points in self.curves.items() if name not in hidden},
            versions=versions(),
            hardware=hardware(trainer),
            speed={"train_images_per_s": round(float(np.median(speeds)), 1)} if speeds else {},
            duration_s=round(self.elapsed(), 1),
            command=self.command,
            seed=getattr(trainer.datamodule, "seed", None),
            base_model=Path(source).name if source and commit is None else source,
            base_model_revision=commit,
            best_step=self.best_step,
        )


class Reconstructions(Callback):
    """Draws original, masked input and reconstruction of the first validation pictures of a SimMIM run.

    Args:
        folder: The run folder; the sheet of each epoch replaces the one before.
        pictures: Number of pictures.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, pictures: int = 4) -> None:
        self.folder = None if folder is None else Path(folder)
        self.pictures = pictures

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch."""
        if batch_idx or trainer.sanity_checking or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if not outputs:  # all unreadable
            return
        images = batch["pixel_values"][: self.pictures]
        mask = outputs["mask"][: self.pictures, None]  # B, 1, H, W in pixels, 1 where hidden
        rebuilt = outputs["reconstruction"][: self.pictures].float()
        rows = [images, images * (1 - mask), images * (1 - mask) + rebuilt * mask]
        sheets = [to_pictures(row, trainer.datamodule) for row in rows]
        pictures = [picture for row in zip(*sheets, strict=True) for picture in row]
        figure = draw_pictures(pictures, ["original", "input", "reconstruction"] * len(images), columns=3)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_figure(figure, self.folder / "reconstructions.png")
        show_figure(trainer, "reconstructions", figure)


def keep_worst(parts: list[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """The ``count`` entries with the highest ``losses``, highest first."""
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = joined["losses"].argsort(descending=True)[:count]
    return {name: value[order] for name, value in joined.items()}


def to_pictures(pixel_values: Tensor, datamodule: Any) -> np.ndarray[Any, Any]:
    """Undo the normalisation: ``(B, C, H, W)`` to ``(B, H, W, 3)`` in [0, 1]."""
    processor = datamodule.image_processor()
    shape = (1, -1, 1, 1)
    mean = torch.tensor(processor.image_mean).view(shape)
    std = torch.tensor(processor.image_std).view(shape)
    pictures = (pixel_values.detach().float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return np.repeat(pictures, 3, axis=-1) if pictures.shape[-1] == 1 else pictures


def class_scores(counts: np.ndarray[Any, Any], labels: list[str]) -> list[ClassScore]:
    """Precision, recall, F1 and support of each class from its confusion counts; 0 where undefined."""
    hits, truths, guesses = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    precision = hits / np.maximum(guesses, 1)
    recall = hits / np.maximum(truths, 1)
    f1 = 2 * hits / np.maximum(truths + guesses, 1)
    return [
        ClassScore(label, float(precision[i]), float(recall[i]), float(f1[i]), int(truths[i]))
        for i, label in enumerate(labels)
    ]


def report(metrics: dict[str, float], scores: list[ClassScore], rows: int = 100) -> str:
    """The table of a test, as text."""
    lines = []
    if scores:
        width = max(5, *(len(score.label) for score in scores))
        lines.append(f"{'class':<{width}}  precision  recall     f1  images")
        for s in scores[:rows]:
            lines.append(f"{s.label:<{width}}  {s.precision:9.4f}  {s.recall:6.4f} {s.f1:6.4f}  {s.support:6}")
        if len(scores) > rows:
            lines.append(f"... and {len(scores) - rows} more, see training_facts.json")
    lines += [f"{name} {value:.4f}" for name, value in metrics.items()]
    return "\n".join(lines)


@rank_zero_only
def show_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Put a figure into every TensorBoard log of the run."""
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if boards:
        pixels = to_pixels(figure)
        for board in boards:
            board.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)


def replace_folder(new: Path, old: Path) -> None:
    """Move a finished folder to its place; what stood there goes only when the new one is in."""
    retired = old.with_name(f".{old.name}.old.{os.getpid()}")
    if old.exists():
        old.rename(retired)
    new.rename(old)
    shutil.rmtree(retired, ignore_errors=True)


def data_facts(datamodule: Any) -> DataFacts:
    """What the card says about the data, from the data module's own account."""
    facts = datamodule.facts()
    source, files = facts["dataset"], facts["data_dir"] or first(facts["data_files"])
    is_hub_id = files is None and source.count("/") == 1 and not Path(source).exists()
    if files is not None:  # a format, such as parquet: name it after its folder
        path = Path(files)
        source = path.parent.name if path.suffix else path.name
    splits = {name: SplitFacts(n) for name, n in facts["splits"].items()}
    if "train" in splits:
        splits["train"].classes = facts["class_counts"]
    return DataFacts(
        name=source or facts["dataset"],
        fingerprint=facts["revision"] or facts["fingerprint"],
        splits=splits,
        config=facts["config_name"],
        is_hub_id=is_hub_id,
        unreadable=facts["unreadable"],
    )


def first(value: Any) -> str | None:
    """The first of the file patterns, however they are nested."""
    while isinstance(value, dict | list | tuple):
        value = next(iter(value.values() if isinstance(value, dict) else value), None)
    return None if value is None else str(value)


def hyper_parameters(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """Flat names and JSON values of what the result depends on."""
    data = trainer.datamodule.facts()
    values = {name: value for name, value in dict(pl_module.hparams).items() if not name.startswith("_")}
    values |= {name: data[name] for name in ("batch_size", "image_size", "interpolation", "mean", "std")}
    values |= data["augmentation"]
    values |= {
        "max_epochs": trainer.max_epochs,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "precision": trainer.precision,
    }
    average = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)
    if average is not None:
        values["ema_decay"] = average.decay
    hidden = {"id2label", "num_labels"}
    return {
        name: public(value)
        for name, value in sorted(values.items())
        if name not in hidden and value is not None and value != {} and value != []
    }


def public(value: Any) -> Any:
    """A value as JSON, with absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {str(key): public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        if Path(value).is_absolute() or value.startswith("~"):
            return Path(value).name
        return _ABSOLUTE.sub(r"\1", _CREDENTIALS.sub("://", value))
    return value if isinstance(value, int | float | bool | type(None)) else str(value)


# A path from the root or from somebody's home, wherever it stands in a text but not in an address; its end is kept.
_ABSOLUTE = re.compile(r"""(?<![\w.:/~-])(?:~|/)[^\s"',;{}\[\]()]*?([^\s"',;{}\[\]()/]*)/*(?=$|[\s"',;{}\[\]()])""")
_CREDENTIALS = re.compile(r"://[^/\s@]+@")
_SECRET = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)


def command_line(argv: list[str] | None = None) -> str:
    """The command of this process, without absolute paths and without secrets."""
    argv = list(sys.argv if argv is None else argv)
    script = Path(argv[0])
    if script.is_absolute():
        try:
            script = script.relative_to(Path.cwd())
        except ValueError:
            script = Path(script.name)
    words = ["python", script.as_posix()]
    hide_next = False
    for word in argv[1:]:
        name, equals, value = word.partition("=")
        if hide_next and not word.startswith("--"):
            words.append("***")
        elif _SECRET.search(name) and equals:
            words.append(f"{name}=***")
        else:
            words.append(f"{name}={public(value)}" if equals else str(public(word)))
        hide_next = bool(_SECRET.search(name)) and not equals
    return shlex.join(words)


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    import swin_hf

    found = {"swin_hf": swin_hf.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        found[name] = importlib.metadata.version(name)
    return found


def hardware(trainer: Trainer) -> dict[str, Any]:
    """Device, number of devices, threads and precision."""
    device = trainer.strategy.root_device
    facts: dict[str, Any] = {"devices": trainer.world_size, "precision": trainer.precision}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    else:
        facts["device"] = f"{device.type.upper()} ({platform.machine()})"
        facts["threads"] = torch.get_num_threads()
    return facts


def log_configuration(trainer: Trainer, configuration: dict[str, Any]) -> None:
    """Hand the whole configuration to the loggers that show one; the CSV log has ``config.yaml`` beside it."""
    for logger in trainer.loggers:
        if not isinstance(logger, CSVLogger):
            logger.log_hyperparams(configuration)
