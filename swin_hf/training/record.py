"""The record of a run: ``model/`` with the best weights and their facts, and the report of a test."""

# mypy: disable-error-code="attr-defined"
# Lightning sets attributes of its Trainer dynamically and re-exports names without saying so.

import copy
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from rich.cells import cell_len, set_cell_size
from torch import Tensor

from swin_hf.files import replacing_folder
from swin_hf.hub.facts import ClassScore, ConfusionMatrix, Metric, TrainingFacts
from swin_hf.text import one_line

from .callbacks import keep_figure, to_pictures
from .checkpointing import BestCheckpoint
from .facts import data_facts, hardware, hyper_parameters, versions
from .figures import LONGEST_NAME, draw_confusion, draw_curves, draw_pictures
from .loggers import AppendingCSVLogger


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
        self.started: float | None = None  # when this part of the training began, None before and after it
        self.trained = False  # whether a step was taken
        self.worst: list[dict[str, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """The curves and the time so far travel with the checkpoint."""
        return {"curves": self.curves, "seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self.curves, self.seconds = state_dict["curves"], state_dict["seconds"]

    def shown_curves(self) -> dict[str, list[list[float]]]:
        """The curves without the number of images behind them."""
        return {name: points for name, points in self.curves.items() if name != "val_images"}

    def elapsed(self) -> float:
        """Seconds spent in fit."""
        return self.seconds + (0.0 if self.started is None else time.monotonic() - self.started)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; the log goes on where the checkpoint was written."""
        self.started = time.monotonic()
        for logger in trainer.loggers:
            if isinstance(logger, AppendingCSVLogger):
                logger.rewind(trainer.global_step, self.shown_curves())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What is logged by now comes to the disk before the checkpoint, which goes on after it."""
        for logger in trainer.loggers:
            if isinstance(logger, AppendingCSVLogger):
                logger.save()

    def on_train_batch_end(self, *_: Any) -> None:
        """Now the run has something to record."""
        self.trained = True

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
            if name.startswith(prefix) and not name.endswith("_step"):
                self.curves.setdefault(name, []).append([trainer.global_step, float(value)])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model folder and the learning curves."""
        self.seconds, self.started = self.elapsed(), None
        if self.folder is None or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        self.write_model(trainer, pl_module)
        if self.curves:
            keep_figure(trainer, self.folder, "curves", lambda: draw_curves(self.shown_curves()))

    def write_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``model/`` of a training that was interrupted, if an epoch of it is complete."""
        if any(isinstance(c, BestCheckpoint) and c.best_model_path for c in trainer.checkpoint_callbacks):
            self.write_model(trainer, pl_module)

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
        with replacing_folder(self.folder / "model") as partial:
            network.exportable().save_pretrained(partial)
            trainer.datamodule.image_processor().save_pretrained(partial)
            facts.save(partial)

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
        n = int(metrics.pop("test_images", 0)) or trainer.datamodule.split_sizes.get("test")
        if not trainer.is_global_zero:
            return
        scores = [] if counts is None else class_scores(counts.numpy(), labels)
        print(report(metrics, scores), flush=True)  # noqa: T201 - the report
        if self.folder is None or not (self.folder / "model").is_dir():
            return
        facts = TrainingFacts.load(self.folder / "model")
        if facts.data is not None:
            facts.data.unreadable = trainer.datamodule.facts()["unreadable"]
        facts.metrics = [m for m in facts.metrics if m.split != "test"]
        facts.metrics += [Metric(name.removeprefix("test_"), value, "test", n) for name, value in metrics.items()]
        if counts is not None:
            facts.metrics.append(Metric("f1_macro", macro_f1(counts.numpy()), "test", n))
            facts.per_class = scores
            facts.confusion_matrix = ConfusionMatrix(labels, counts.tolist(), "test")
        facts.save(self.folder / "model")  # the results, before anything is drawn
        if counts is not None:
            keep_figure(trainer, self.folder, "confusion_matrix", lambda: draw_confusion(counts.numpy(), labels))
        if self.worst:
            keep_figure(trainer, self.folder, "worst_pictures", lambda: self.draw_worst(trainer, labels))

    def draw_worst(self, trainer: Trainer, labels: list[str]) -> Figure:
        """A sheet of the worst predicted pictures."""
        worst = {name: value.cpu() for name, value in self.worst[0].items()}
        pictures = list(to_pictures(worst["pixel_values"], trainer.datamodule))
        names = [one_line(label, LONGEST_NAME) for label in labels]
        captions = [
            f"{names[label]},\nseen as {names[prediction]}\nloss {loss:.2f}"
            for label, prediction, loss in zip(
                worst["labels"].tolist(), worst["predictions"].tolist(), worst["losses"].tolist(), strict=True
            )
        ]
        return draw_pictures(pictures, captions)

    def facts(self, trainer: Trainer, pl_module: LightningModule) -> TrainingFacts:
        """Everything the card may want to know; nothing secret, no absolute path."""
        source, commit = getattr(pl_module, "starting_point", None), getattr(pl_module, "starting_commit", None)
        speeds = [value for _, value in self.curves.get("train_images_per_s", [])]
        return TrainingFacts(
            data=data_facts(trainer.datamodule),
            hyper_parameters=hyper_parameters(trainer, pl_module),
            curves={name: points for name, points in self.shown_curves().items() if name != "train_images_per_s"},
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


def keep_worst(parts: list[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """The ``count`` entries with the highest ``losses``, highest first."""
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = joined["losses"].argsort(descending=True)[:count]
    return {name: value[order] for name, value in joined.items()}


def class_scores(counts: np.ndarray[Any, Any], labels: list[str]) -> list[ClassScore]:
    """Precision, recall, F1 and support of each class from its confusion counts.

    What would divide by zero is None: the precision of a class that was never predicted, the recall and the F1 of a
    class without pictures.
    """
    scores = []
    for label, hits, truths, guesses in zip(
        labels, np.diag(counts).tolist(), counts.sum(axis=1).tolist(), counts.sum(axis=0).tolist(), strict=True
    ):
        precision = hits / guesses if guesses else None
        recall, f1 = (hits / truths, 2 * hits / (truths + guesses)) if truths else (None, None)
        scores.append(ClassScore(label, precision, recall, f1, truths))
    return scores


def macro_f1(counts: np.ndarray[Any, Any]) -> float:
    """Mean F1 of the classes that occur among the truths or the predictions, as scikit-learn and torchmetrics have it.

    Args:
        counts: ``(classes, classes)`` integers, rows are the truth.
    """
    sizes = counts.sum(axis=1) + counts.sum(axis=0)
    return float(np.mean((2 * np.diag(counts))[sizes > 0] / sizes[sizes > 0])) if sizes.any() else 0.0


def report(metrics: dict[str, float], scores: list[ClassScore], rows: int = 100) -> str:
    """The table of a test, as text."""
    lines = []
    if scores:
        names = [one_line(score.label, LONGEST_NAME) for score in scores[:rows]]
        width = max(5, *map(cell_len, names))  # cells of the terminal: a Chinese letter takes two
        lines.append(f"{'class':<{width}}  precision  recall      f1  images")
        for name, s in zip(names, scores, strict=False):
            shares = [f"{'-' if share is None else format(share, '.4f'):>6}" for share in (s.precision, s.recall, s.f1)]
            lines.append(f"{set_cell_size(name, width)}  {shares[0]:>9}  {shares[1]}  {shares[2]}  {s.support:6}")
        if len(scores) > rows:
            lines.append(f"... and {len(scores) - rows} more, see training_facts.json")
    lines += [f"{name} {value:.4f}" for name, value in metrics.items()]
    return "\n".join(lines)
