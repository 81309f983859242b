"""Image classification: cross-entropy on hard or soft targets, everything else is regularisation."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from swin_hf.hub.facts import ClassScore, ConfusionMatrix
from swin_hf.hub.pictures import draw_confusion
from swin_hf.text import one_line, text_table

from ..module import TestReport
from ..network import Network
from ..optim import Optimization
from .distillation import Distillation, Teacher, imitation_loss, load_teacher
from .heads import Freezing, HeadModule, Lora, Mixing
from .sheets import LONGEST_NAME, draw_sheet

# A confusion matrix of more classes than this (8 MB of counts at 1000) is neither kept nor drawn.
MAX_CONFUSION_CLASSES = 1000
SHOWN_CLASSES = 100  # in the table of a test


class SwinClassifier(HeadModule):
    """Train a Swin Transformer to classify images.

    The defaults are Microsoft's fine-tuning of a pre-trained model without Mixup; the full recipe is the configuration
    ``imagenet1k_swin_tiny``. Learning rates are given for 512 images a step and scaled to the real global batch. The
    other arguments and the errors are those of :class:`~swin_hf.training.tasks.heads.HeadModule`.

    Args:
        mixing: Label smoothing, Mixup, CutMix and class weights.
        distillation: A teacher that is imitated.
    """

    monitor = "val_accuracy"
    mode = "max"
    answer_columns = ("label", "prediction", "probability")
    sheet_sizes: ClassVar[dict[str, int]] = {"worst_pictures": 16, **HeadModule.sheet_sizes}

    mixing: Mixing

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
        super().__init__(
            preset, weights, num_labels, id2label, image_size, num_channels, network, optimization, freezing, lora
        )
        self.mixing = mixing
        self.mix = mixing.transform(self.model.config.num_labels)
        self.distillation = distillation
        self.teacher: list[Teacher] = []  # in a list: neither saved, nor averaged, nor trained

    def configure_metrics(self, labels: int) -> None:
        """Accuracies and, in a test, the calibration error and the confusion matrix."""
        accuracies: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(labels, average="micro", validate_args=False)
        }
        if labels > 5:
            accuracies["accuracy_top5"] = MulticlassAccuracy(labels, top_k=5, average="micro", validate_args=False)
        metrics = MetricCollection(accuracies, compute_groups=False)
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")
        self.test_metrics.add_metrics({"ece": MulticlassCalibrationError(labels, n_bins=15, validate_args=False)})
        is_counted = labels <= MAX_CONFUSION_CLASSES
        self.confusion = MulticlassConfusionMatrix(labels, validate_args=False) if is_counted else None

    def setup(self, stage: str) -> None:
        """Check the model against the data, weigh the classes and load the teacher; ValueError if they do not fit."""
        super().setup(stage)
        teacher, config, data = self.distillation.teacher, self.model.config, self.datamodule
        if stage == "fit" and teacher is not None and not self.teacher:
            normalization = (data.mean, data.std) if hasattr(data, "mean") and hasattr(data, "std") else None
            self.teacher = [load_teacher(teacher, config.id2label, config.num_channels, normalization)]

    def on_fit_start(self) -> None:
        """Bring the teacher to the device, and say what is trained."""
        super().on_fit_start()
        for teacher in self.teacher:
            teacher.to(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch, after mixing; ``labels`` are ``(B,)`` class numbers."""
        images, targets = self.mix(batch["pixel_values"], batch["labels"])  # targets: B, or B, num_labels
        logits = self(images)
        smoothing, weights = self.mixing.label_smoothing, self.class_weights
        if weights is None:
            loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        else:  # the mean over the images, not over their weights: the same on any number of devices
            loss = F.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="none").mean()
        if self.teacher:
            with torch.no_grad():
                wanted = self.teacher[0](images)
            weight = self.distillation.weight
            loss = (1 - weight) * loss + weight * imitation_loss(logits, wanted, self.distillation.temperature)
        self.log_training(loss, len(targets))
        return loss

    def evaluate(self, batch: dict[str, Tensor], split: str) -> dict[str, Tensor]:
        """Add a batch to the metrics of a split; return its ``logits`` ``(B, num_labels)`` and ``losses`` ``(B,)``."""
        labels, logits = batch["labels"], self(batch["pixel_values"]).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        getattr(self, f"{split}_loss").update(losses)
        # torchmetrics takes a batch of values that are all in [0, 1] for probabilities; the log of them is negative.
        getattr(self, f"{split}_metrics").update(logits.log_softmax(-1), labels)
        if split == "test" and self.confusion is not None:
            self.confusion.update(logits, labels)
        return {"logits": logits, "losses": losses}

    def fill_sheets(self, batch: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Keep pictures by lot, and those with the highest losses."""
        super().fill_sheets(batch, outputs)
        losses = outputs["losses"].nan_to_num(math.inf).tolist()
        self.sheets["worst_pictures"].offer(losses, partial(self.shown, batch, outputs))

    def conclude(self, split: str) -> np.ndarray[Any, Any] | None:
        """The confusion counts of a test, ``(num_labels, num_labels)``: rows are the truth."""
        if split == "val" or self.confusion is None:
            return None
        counts: np.ndarray[Any, Any] = self.confusion.compute().cpu().numpy()
        self.confusion.reset()
        return counts

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Probabilities ``(B, num_labels)``."""
        return self.forward(batch["pixel_values"]).softmax(-1)

    def answers(self, outputs: Any, labels: Tensor) -> list[tuple[Any, ...]]:
        """Class, predicted class and its probability."""
        names = self.class_names
        shares, predictions = outputs["logits"].float().softmax(-1).max(-1)
        rows = zip(labels.tolist(), predictions.tolist(), shares.tolist(), strict=True)
        return [(names[label], names[prediction], share) for label, prediction, share in rows]

    def test_report(self) -> TestReport:
        """Scores of each class, the confusion matrix, and the sheets of test pictures."""
        report, counts, labels = super().test_report(), self.tested, self.class_names
        if counts is None:
            return report
        scores = class_scores(counts, labels)
        return TestReport(
            table=score_table(scores),
            metrics={"f1_macro": macro_f1(counts)},
            facts={"per_class": scores, "confusion_matrix": ConfusionMatrix(labels, counts.tolist(), "test")},
            figures={"confusion_matrix": partial(draw_confusion, counts, labels)} | report.figures,
        )

    def draw(self, sheet: str) -> Figure:
        """A sheet; that of the worst pictures has losses and names of files."""
        if sheet != "worst_pictures":
            return super().draw(sheet)
        worst = [
            replace(shown, captions=[f"{text}, loss {loss:.2f}" for text in shown.captions])
            for loss, shown in self.sheets[sheet].kept
        ]
        files = [one_line(shown.file, LONGEST_NAME) for shown in worst]
        return draw_sheet(worst, self.class_names, files)


def class_scores(counts: np.ndarray[Any, Any], labels: list[str]) -> list[ClassScore]:
    """Precision, recall, F1 and support of each class from its confusion counts, whose rows are the truth."""
    hits, truths, guesses = (sizes.tolist() for sizes in (np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)))
    return [class_score(*values) for values in zip(labels, hits, truths, guesses, strict=True)]


def class_score(label: str, hits: int, truths: int, guesses: int) -> ClassScore:
    """Scores of a class with ``truths`` pictures that was predicted for ``guesses``, rightly for ``hits``.

    What would divide by zero is None: the precision of a class that was never predicted, the recall and the F1 of a
    class without pictures.
    """
    precision = hits / guesses if guesses else None
    recall, f1 = (hits / truths, 2 * hits / (truths + guesses)) if truths else (None, None)
    return ClassScore(label, precision, recall, f1, truths)


def macro_f1(counts: np.ndarray[Any, Any]) -> float:
    """Mean F1 of the classes that occur among truths or predictions, as scikit-learn and torchmetrics have it."""
    sizes = counts.sum(axis=1) + counts.sum(axis=0)
    return float(np.mean((2 * np.diag(counts))[sizes > 0] / sizes[sizes > 0])) if sizes.any() else 0.0


def score_table(
    scores: list[ClassScore], columns: Sequence[str] = ("precision", "recall", "f1"), pixels: int | None = None
) -> str:
    """Scores of the first 100 classes as text, with the images of each, or the share that it has of the pixels."""
    lines = [["class", *columns, "pixels" if pixels else "images"]]
    for score in scores[:SHOWN_CLASSES]:
        shares = (getattr(score, column.lower()) for column in columns)
        cells = ["-" if share is None else f"{share:.4f}" for share in shares]
        size = f"{score.support / pixels:.2%}" if pixels else str(score.support)
        lines.append([one_line(score.label, LONGEST_NAME), *cells, size])
    more = f"\n... and {len(scores) - SHOWN_CLASSES} more, see training_facts.json"
    return text_table(lines) + (more if len(scores) > SHOWN_CLASSES else "")
