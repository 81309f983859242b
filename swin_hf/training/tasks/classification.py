"""Image classification: cross-entropy on hard or soft targets, everything else is regularisation."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from rich.cells import cell_len, set_cell_size
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)
from torchvision.transforms import v2

from swin_hf.classes import class_table
from swin_hf.hub.facts import ClassScore, ConfusionMatrix
from swin_hf.ranges import check_fields, ranged
from swin_hf.text import one_line

from ..callbacks import keep_figure, to_pictures
from ..figures import LONGEST_NAME, draw_confusion, draw_pictures
from ..module import TestReport
from ..network import Network
from ..optim import Optimization
from .distillation import Distillation, Teacher, imitation_loss, load_teacher
from .heads import ClassWeights, Freezing, HeadModule, Lora, check_weights

# A confusion matrix of more classes than this (8 MB of counts at 1000) is neither kept nor drawn.
MAX_CONFUSION_CLASSES = 1000
# Sheets of test pictures: what their pictures have the highest values of, and how many there are.
SHEETS = {"worst_pictures": ("losses", 16), "sample_pictures": ("lots", 8)}


@dataclass(frozen=True)
class Mixing:
    """What the loss compares: label smoothing, Mixup and CutMix make soft targets, and classes may weigh more or less.

    Args:
        label_smoothing: Probability spread over all classes, in [0, 1].
        mixup_alpha: Beta parameter of Mixup; 0 is off.
        cutmix_alpha: Beta parameter of CutMix; 0 is off. With both, each batch takes one of them.
        mix_probability: Share of the batches that are mixed.
        class_weights: Weight of each class in the training loss: a list in the order of the classes, or by name, or
            balanced, which is pictures / (classes x pictures of the class); with several labels an image, the weight
            of its presence, which balanced makes absences / presences.
    """

    label_smoothing: float = ranged(0.1, "[0, 1]")
    mixup_alpha: float = ranged(0.0, "[0, inf)")
    cutmix_alpha: float = ranged(0.0, "[0, inf)")
    mix_probability: float = ranged(1.0, "[0, 1]")
    class_weights: ClassWeights = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_weights(self.class_weights)

    def transform(self, classes: int) -> v2.Transform | None:
        """Mixup, CutMix or a choice of both, for a batch and its labels; ``None`` when both are off.

        Targets of a mixed batch become ``(B, classes)``.
        """
        choices: list[nn.Module] = []
        if self.mixup_alpha:
            choices.append(v2.MixUp(alpha=self.mixup_alpha, num_classes=classes))
        if self.cutmix_alpha:
            choices.append(v2.CutMix(alpha=self.cutmix_alpha, num_classes=classes))
        if not choices:
            return None
        mix = choices[0] if len(choices) == 1 else v2.RandomChoice(choices)
        return mix if self.mix_probability == 1 else v2.RandomApply([mix], p=self.mix_probability)


class SwinClassifier(HeadModule):
    """Train a Swin Transformer to classify images.

    The defaults are Microsoft's fine-tuning of a pre-trained model without Mixup; the full recipe is the configuration
    ``imagenet1k_swin_tiny``. Learning rates are given for 512 images a step and scaled to the real global batch.

    Args:
        preset: Size of a new model, one of ``swin_hf.list_presets()``; ignored when ``weights`` are given.
        weights: Weights to start from: a ``save_pretrained`` folder (SimMIM too), a Hub id, or a checkpoint of
            Microsoft, timm, torchvision, transformers or OpenMMLab. The head is replaced when the classes differ.
        num_labels: Number of classes; from the data when run by the command line.
        id2label: Class number to name; from the data when run by the command line.
        image_size: Side, or height and width, of the images in pixels; from the data when run by the command line.
        num_channels: Channels of the images; from the data when run by the command line.
        network: What is changed in the network of the preset or the weights.
        optimization: AdamW, its learning rate and the schedule.
        mixing: Label smoothing, Mixup and CutMix.
        freezing: What is not trained.
        lora: Low-rank adapters.
        distillation: A teacher that is imitated.

    Raises:
        ValueError: For a value out of range, or a checkpoint that does not fit; the message says which.
    """

    monitor = "val_accuracy"
    mode = "max"
    finetuning_config = "finetune_imagefolder"
    answer_columns = ("label", "prediction", "probability")

    def __init__(
        self,
        preset: str = "swin_tiny_patch4_window7_224",
        weights: str | None = None,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_channels: int | None = None,
        network: Network = Network(),
        optimization: Optimization = Optimization(),
        mixing: Mixing = Mixing(),
        freezing: Freezing = Freezing(),
        lora: Lora = Lora(),
        distillation: Distillation = Distillation(),
    ) -> None:
        super().__init__(optimization, network.compile)
        # Not to the loggers: the command logs the whole configuration once, without clashes with the data's.
        self.save_hyperparameters(logger=False)
        classes = self.build(preset, weights, num_labels, id2label, image_size, num_channels, network, freezing, lora)
        self.mixing = mixing
        self.mix = mixing.transform(classes)
        self.distillation = distillation
        self.teacher: list[Teacher] = []  # in a list: neither saved, nor averaged, nor trained
        self.configure_metrics(classes)

    def configure_metrics(self, classes: int) -> None:
        """Create the metrics: objects that hold counts, hence exact over any number of processes."""
        accuracies: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False)
        }
        if classes > 5:
            accuracies["accuracy_top5"] = MulticlassAccuracy(classes, top_k=5, average="micro", validate_args=False)
        metrics = MetricCollection(accuracies, compute_groups=False)
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")
        self.test_metrics.add_metrics({"ece": MulticlassCalibrationError(classes, n_bins=15, validate_args=False)})
        self.confusion: MulticlassConfusionMatrix | None = None
        if classes <= MAX_CONFUSION_CLASSES:
            self.confusion = MulticlassConfusionMatrix(classes, validate_args=False)
        self.confusion_counts: Tensor | None = None  # (classes, classes), after a test: rows are the truth

    def setup(self, stage: str) -> None:
        """Check the model against the data, weigh the classes and load the teacher.

        Raises:
            ValueError: If the data has another number of classes, or the weights or the teacher do not fit.
        """
        super().setup(stage)
        if stage == "fit":
            self.weigh_classes(self.mixing.class_weights)
        if stage == "fit" and self.distillation.teacher is not None and not self.teacher:
            data: Any = getattr(self.trainer, "datamodule", None)
            config = self.model.config
            normalization = (data.mean, data.std) if hasattr(data, "mean") and hasattr(data, "std") else None
            teacher = load_teacher(self.distillation.teacher, config.id2label, config.num_channels, normalization)
            self.teacher = [teacher]

    def on_fit_start(self) -> None:
        """Bring the teacher to the device, and say what is trained."""
        super().on_fit_start()
        for teacher in self.teacher:
            teacher.to(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch, after mixing; ``labels`` are ``(B,)`` class numbers."""
        images, labels = batch["pixel_values"], batch["labels"]
        targets = labels
        if self.mix is not None:
            images, targets = self.mix(images, labels)  # targets: B, num_labels
        logits = self(images)
        smoothing, weights = self.mixing.label_smoothing, self.class_weights
        if weights is None:
            loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        else:  # the mean over the images, not over their weights: the same on any number of devices
            losses = F.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="none")
            loss = losses.mean()
        if self.teacher:
            with torch.no_grad():
                wanted = self.teacher[0](images)
            weight = self.distillation.weight
            loss = (1 - weight) * loss + weight * imitation_loss(logits, wanted, self.distillation.temperature)
        self.log_training(loss, len(labels))
        return loss

    def evaluate(self, batch: dict[str, Tensor], split: str) -> dict[str, Tensor]:
        """Add a batch to the loss and accuracies of a split, in a test also to the confusion counts.

        Returns:
            ``logits`` ``(B, num_labels)`` and ``losses`` ``(B,)``; nothing for an empty batch.
        """
        loss, metrics, outputs = getattr(self, f"{split}_loss"), getattr(self, f"{split}_metrics"), {}
        if batch:
            labels = batch["labels"]
            logits = self(batch["pixel_values"])
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            loss.update(losses)
            metrics.update(logits, labels)
            if split == "test" and self.confusion is not None:
                self.confusion.update(logits, labels)
            outputs = {"logits": logits, "losses": losses}
        self.log(f"{split}_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True)
        return outputs

    def on_test_epoch_end(self) -> None:
        """Keep the confusion counts of all processes."""
        if self.confusion is not None:
            self.confusion_counts = self.confusion.compute().cpu()
            self.confusion.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Probabilities ``(B, num_labels)``."""
        return self.forward(batch["pixel_values"]).softmax(-1)

    def answers(self, outputs: Any, labels: Tensor) -> list[tuple[Any, ...]]:
        """Class, predicted class and its probability."""
        names = class_table(self.model.config.id2label)
        shares, predictions = outputs["logits"].float().softmax(-1).max(-1)
        rows = zip(labels.tolist(), predictions.tolist(), shares.tolist(), strict=True)
        return [(names[label], names[prediction], share) for label, prediction, share in rows]

    def run_callbacks(self, folder: Path | None) -> list[Callback]:
        """The sheets of test pictures."""
        return [PictureSheets(folder)]

    def test_report(self) -> TestReport:
        """Scores of each class, and the confusion matrix."""
        if self.confusion_counts is None:
            return TestReport()
        counts, labels = self.confusion_counts.numpy(), class_table(self.model.config.id2label)
        scores = class_scores(counts, labels)
        return TestReport(
            table=score_table(scores),
            metrics={"f1_macro": macro_f1(counts)},
            facts={"per_class": scores, "confusion_matrix": ConfusionMatrix(labels, counts.tolist(), "test")},
            figures={"confusion_matrix": partial(draw_confusion, counts, labels)},
        )


class PictureSheets(Callback):
    """Draws test pictures into the run folder: those with the highest losses, and some drawn by lot for the card.

    Args:
        folder: The run folder; without one, or where it has no model yet, nothing is drawn.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the pictures of an earlier test."""
        self.kept: dict[str, list[dict[str, Tensor]]] = {sheet: [] for sheet in SHEETS}
        self.lots = torch.Generator().manual_seed(trainer.global_rank)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the pictures with the highest losses, and with the highest numbers drawn."""
        if not outputs:
            return
        labels = batch["labels"]
        probabilities, predictions = outputs["logits"].float().softmax(-1).max(-1)
        found = {
            "losses": outputs["losses"],
            "lots": torch.rand(len(labels), generator=self.lots).to(labels.device),
            "pixel_values": batch["pixel_values"],
            "labels": labels,
            "predictions": predictions,
            "probabilities": probabilities,
            "rows": batch.get("rows", torch.full_like(labels, -1)),  # of a stream they are unknown
        }
        self.kept = {sheet: [keep_highest([*parts, found], *SHEETS[sheet])] for sheet, parts in self.kept.items()}

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the pictures of all processes."""
        if trainer.world_size == 1:
            return
        for sheet, parts in self.kept.items():
            mine = [{name: value.cpu() for name, value in part.items()} for part in parts]
            everyone: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, mine)
            found = [part for parts in everyone for part in parts]
            self.kept[sheet] = [keep_highest(found, *SHEETS[sheet])] if found else []

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if self.folder is not None and trainer.is_global_zero and (self.folder / "model").is_dir():
            network: Any = pl_module.model
            labels = class_table(network.config.id2label)
            for sheet in (sheet for sheet, parts in self.kept.items() if parts):
                keep_figure(trainer, self.folder, sheet, partial(self.draw, trainer, labels, sheet))

    def draw(self, trainer: Trainer, labels: list[str], sheet: str) -> Figure:
        """A sheet; that of the card has no names of files."""
        kept = {name: value.cpu() for name, value in self.kept[sheet][0].items()}
        names = [one_line(label, LONGEST_NAME) for label in labels]
        columns = (kept[name].tolist() for name in ("labels", "predictions", "probabilities", "losses"))
        captions = [
            f"{names[label]},\nseen as {names[prediction]}\nprobability {probability:.2f}, loss {loss:.2f}"
            for label, prediction, probability, loss in zip(*columns, strict=True)
        ]
        loader: Any = trainer.test_dataloaders
        rows = kept["rows"].tolist() if sheet == "worst_pictures" else []
        files = ["" if row < 0 else one_line(loader.dataset.file_name(row), LONGEST_NAME) for row in rows]
        return draw_pictures(list(to_pictures(kept["pixel_values"], trainer.datamodule)), captions, files=files)


def keep_highest(parts: list[dict[str, Tensor]], key: str, count: int) -> dict[str, Tensor]:
    """The ``count`` entries with the highest values of ``key``, highest first."""
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = joined[key].argsort(descending=True)[:count]
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


def score_table(scores: list[ClassScore], rows: int = 100) -> str:
    """The scores of the classes as text, at most ``rows`` of them."""
    names = [one_line(score.label, LONGEST_NAME) for score in scores[:rows]]
    width = max(5, *map(cell_len, names))  # cells of the terminal: a Chinese letter takes two
    lines = [f"{'class':<{width}}  precision  recall      f1  images"]
    for name, s in zip(names, scores, strict=False):
        shares = [f"{'-' if share is None else format(share, '.4f'):>6}" for share in (s.precision, s.recall, s.f1)]
        lines.append(f"{set_cell_size(name, width)}  {shares[0]:>9}  {shares[1]}  {shares[2]}  {s.support:6}")
    if len(scores) > rows:
        lines.append(f"... and {len(scores) - rows} more, see training_facts.json")
    return "\n".join(lines)
