"""The record of a run: ``model/`` with the best weights and their facts, and the report of a test."""

import copy
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from swin_hf.files import replacing_folder
from swin_hf.hub.facts import Metric, TrainingFacts
from swin_hf.hub.pictures import draw_curves
from swin_hf.loading import Origin

from .callbacks import keep_figure
from .checkpointing import best_checkpoint
from .facts import default_settings, hardware, hyper_parameters, versions
from .loggers import AppendingCSVLogger
from .module import TestReport


class RunRecord(Callback):
    """Leaves the run's result in its folder: ``model/`` with the best weights and their facts, and the figures.

    ``model/`` is what ``save_pretrained`` writes plus ``training_facts.json``, complete or not at all. Without a
    folder, the report of a test is printed and nothing is written. The ``command`` is for the facts.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, command: str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.command = command
        self.curves: dict[str, list[list[float]]] = {}
        self.seconds = 0.0  # spent in fit, over all of its parts
        self.started: float | None = None  # when this part of the training began, None before and after it
        self.trained = False  # whether a step was taken

    def state_dict(self) -> dict[str, Any]:
        """The curves and the time so far travel with the checkpoint."""
        return {"curves": self.curves, "seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self.curves, self.seconds = state_dict["curves"], state_dict["seconds"]

    def shown_curves(self, *others: str) -> dict[str, list[list[float]]]:
        """The curves without the number of images behind them, and without others."""
        return {name: points for name, points in self.curves.items() if name not in ("val_images", *others)}

    def elapsed(self) -> float:
        """Seconds spent in fit."""
        return self.seconds + (0.0 if self.started is None else time.monotonic() - self.started)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock, and continue the log where the checkpoint was written."""
        self.started = time.monotonic()
        for logger in trainer.loggers:
            if isinstance(logger, AppendingCSVLogger):
                logger.rewind(trainer.global_step, self.shown_curves())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the log to the disk before the checkpoint: a run that resumes there continues the log."""
        for logger in trainer.loggers:
            if isinstance(logger, AppendingCSVLogger):
                logger.save()

    def on_train_batch_end(self, *_: Any) -> None:
        """Now the run has something to record."""
        self.trained = True

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Add a point to the validation curves."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.add_points(trainer, "val_")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Add a point to the training curves; validation is over by now, so all its pictures have been tried too."""
        trainer.datamodule.share_unreadable()
        self.add_points(trainer, "train_")
        rate = trainer.optimizers[0].param_groups[-1]["lr"]
        self.curves.setdefault("learning_rate", []).append([trainer.global_step, rate])

    def add_points(self, trainer: Trainer, prefix: str) -> None:
        """Add the current metrics whose names begin so."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith(prefix) and not name.endswith("_step"):
                self.curves.setdefault(name, []).append([trainer.global_step, float(value)])

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the model folder and the learning curves."""
        self.seconds, self.started = self.elapsed(), None
        if self.folder is None or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        best_step = self.write_model(trainer, pl_module)
        if self.curves:
            keep_figure(trainer, self.folder, "curves", lambda: draw_curves(self.shown_curves(), best_step))

    def write_model(self, trainer: Trainer, pl_module: Any) -> int:
        """Write ``model/`` from the best checkpoint, or the weights at hand without one; return the step of them."""
        assert self.folder is not None
        network: Any = copy.deepcopy(pl_module)
        facts, best = self.facts(trainer, pl_module), best_checkpoint(trainer)
        facts.best_step = trainer.global_step
        if best is not None and best.best_model_path and Path(best.best_model_path).is_file():
            checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True, mmap=True)
            network.load_state_dict(checkpoint["state_dict"])
            facts.best_step = int(checkpoint["global_step"])
            facts.metrics = self.metrics_at(facts.best_step, trainer)
        with replacing_folder(self.folder / "model") as partial:
            network.exportable().save_pretrained(partial)
            trainer.datamodule.image_processor().save_pretrained(partial)
            facts.save(partial)
        return facts.best_step

    def metrics_at(self, step: int, trainer: Trainer) -> list[Metric]:
        """Validation metrics of the epoch that ended at a step, with the number of images that were measured."""
        counts = {at: int(count) for at, count in self.curves.get("val_images", [])}
        n = counts.get(step, trainer.datamodule.split_sizes.get("validation"))
        return [
            Metric(name.removeprefix("val_"), value, "validation", n)
            for name, points in self.shown_curves().items()
            for at, value in points
            if name.startswith("val_") and at == step
        ]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Every rank learns which pictures could not be read."""
        trainer.datamodule.share_unreadable()

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print what the task found; add it to the facts and draw its figures."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test_")}
        n = int(metrics.pop("test_images", 0)) or trainer.datamodule.split_sizes.get("test")
        if not trainer.is_global_zero:
            return
        found: TestReport = pl_module.test_report()
        lines = [found.table, *(f"{name} {value:.4f}" for name, value in metrics.items())]
        print("\n".join(filter(None, lines)), flush=True)  # noqa: T201 - the result
        if self.folder is None or not (self.folder / "model").is_dir():
            return
        facts = TrainingFacts.load(self.folder / "model")
        if facts.data is not None:
            facts.data.unreadable = trainer.datamodule.facts().unreadable
        measured = {name.removeprefix("test_"): value for name, value in metrics.items()} | found.metrics
        facts.metrics = [m for m in facts.metrics if m.split != "test"]
        bounds = {name: list(pair) for name, pair in found.intervals.items()}
        facts.metrics += [Metric(name, value, "test", n, bounds.get(name)) for name, value in measured.items()]
        replace(facts, **found.facts).save(self.folder / "model")  # the results, before anything is drawn
        for name, draw in found.figures.items():
            keep_figure(trainer, self.folder, name, draw)

    def facts(self, trainer: Trainer, pl_module: Any) -> TrainingFacts:
        """Everything the card may want to know; nothing secret, no absolute path."""
        origin: Origin | None = pl_module.origin
        base: dict[str, Any] = {}
        if origin is not None:
            path = origin.path.resolve()
            name = (path.parent if path.name == "model" else path).name
            base = {"base_model": origin.repo_id or name, "base_model_revision": origin.commit}
            base["base_model_license"] = origin.license
        speeds = [value for _, value in self.curves.get("train_images_per_s", [])]
        return TrainingFacts(
            data=trainer.datamodule.facts(),
            hyper_parameters=hyper_parameters(trainer, pl_module),
            default_settings=default_settings(trainer, pl_module),
            curves=self.shown_curves("train_images_per_s"),
            versions=versions(),
            hardware=hardware(trainer),
            speed={"train_images_per_s": round(float(np.median(speeds)), 1)} if speeds else {},
            duration_s=round(self.elapsed(), 1),
            command=self.command,
            seed=trainer.datamodule.seed,
            **base,
        )
