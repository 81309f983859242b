"""Multi-label classification: whether each class is in a picture, by binary cross-entropy."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelStatScores

from ..data.targets import MultiLabelDataModule
from ..module import TestReport
from ..network import Network
from ..optim import Optimization
from .classification import class_score, score_table
from .heads import Freezing, HeadModule, Lora, Mixing

THRESHOLD = 0.5  # probability from which a class counts as found


class SwinMultiLabelClassifier(HeadModule):
    """Train a Swin Transformer to find every class that a picture shows.

    The loss is transformers' for ``problem_type="multi_label_classification"``. The best checkpoint is the one with the
    highest mean average precision (mAP) over the classes that occur in the validation split. The other arguments and
    the errors are those of :class:`~swin_hf.training.tasks.heads.HeadModule`.

    Args:
        mixing: Label smoothing (towards 0.5), Mixup, CutMix and class weights.
    """

    monitor = "val_map"
    mode = "max"
    problem_type = "multi_label_classification"
    data_class = MultiLabelDataModule
    default_config = "multi_label"
    answer_columns = ("label", "prediction", "probability")

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
        mixing: Mixing = Mixing(label_smoothing=0.0),
        freezing: Freezing = Freezing(),
        lora: Lora = Lora(),
    ) -> None:
        super().__init__(
            preset, weights, num_labels, id2label, image_size, num_channels, network, optimization, freezing, lora
        )
        self.mixing = mixing
        self.mix = mixing.transform(self.model.config.num_labels)

    def configure_metrics(self, labels: int) -> None:
        """Average precisions and counts of each class."""
        precision = MultilabelAveragePrecision(labels, average="none", validate_args=False)
        counts = MultilabelStatScores(labels, threshold=THRESHOLD, average="none", validate_args=False)
        self.val_precision, self.test_precision = precision, precision.clone()
        self.val_counts, self.test_counts = counts, counts.clone()

    def balanced_weights(self, counts: Tensor, pictures: int) -> Tensor:
        """Pictures without each class for one with it."""
        return (pictures - counts) / counts

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Binary cross-entropy of one batch, after mixing; ``labels`` are ``(B, num_labels)`` of 0 and 1."""
        images, targets = self.mix(batch["pixel_values"], batch["labels"])
        smoothing = self.mixing.label_smoothing
        targets = targets * (1 - smoothing) + smoothing / 2
        loss = F.binary_cross_entropy_with_logits(self(images), targets, pos_weight=self.class_weights)
        self.log_training(loss, len(targets))
        return loss

    def evaluate(self, batch: dict[str, Tensor], split: str) -> dict[str, Tensor]:
        """Add a batch to the metrics of a split, and return its ``logits`` ``(B, num_labels)``."""
        labels, logits = batch["labels"], self(batch["pixel_values"]).float()
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        getattr(self, f"{split}_loss").update(loss, weight=len(labels))
        for name in ("precision", "counts"):
            getattr(self, f"{split}_{name}").update(logits.sigmoid(), labels.long())
        return {"logits": logits}

    def conclude(self, split: str) -> Tensor:
        """Log the mean average precision and F1; return the counts, ``(num_labels, 5)``, of MultilabelStatScores."""
        precision, counter = getattr(self, f"{split}_precision"), getattr(self, f"{split}_counts")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that classes do not occur: they are left out
            precisions = precision.compute()
        counts: Tensor = counter.compute().cpu()
        precision.reset()
        counter.reset()
        hits, wrong, _, missed, support = counts.double().unbind(1)
        f1 = 2 * hits / (2 * hits + wrong + missed).clamp(min=1)
        occurs = support > 0
        values = {
            "map": precisions.cpu()[occurs].mean() if occurs.any() else torch.zeros(()),
            "f1_macro": f1[occurs].mean() if occurs.any() else torch.zeros(()),
            "f1_micro": 2 * hits.sum() / (2 * hits + wrong + missed).sum().clamp(min=1),
        }
        self.log_dict({f"{split}_{name}": value.float() for name, value in values.items()}, prog_bar=True)
        return counts

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Probabilities ``(B, num_labels)``, each by itself."""
        return self.forward(batch["pixel_values"]).sigmoid()

    def answers(self, outputs: Any, labels: Tensor) -> list[tuple[Any, ...]]:
        """The classes, those that were found, and the probabilities of these, with bars between them."""
        names, rows = self.class_names, []
        for truth, shares in zip(labels.tolist(), outputs["logits"].sigmoid().tolist(), strict=True):
            found = [(name, share) for name, share in zip(names, shares, strict=True) if share > THRESHOLD]
            true = [name for name, present in zip(names, truth, strict=True) if present]
            probabilities = "|".join(f"{share:.6g}" for _, share in found)
            rows.append(("|".join(true), "|".join(name for name, _ in found), probabilities))
        return rows

    def test_report(self) -> TestReport:
        """Scores of each class."""
        report = super().test_report()
        report.facts["per_class"] = scores = [
            class_score(name, hits, support, hits + wrong)
            for name, (hits, wrong, _, _, support) in zip(self.class_names, self.tested.tolist(), strict=True)
        ]
        report.table = score_table(scores)
        return report
