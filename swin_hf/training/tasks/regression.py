"""Regression: one number for each picture, or several, by mean squared error."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from swin_hf.text import one_line, text_table

from ..data.targets import RegressionDataModule
from ..module import TestReport
from .heads import HeadModule
from .sheets import LONGEST_NAME


class Determination(R2Score):
    """R2; NaN of fewer than two pictures, where torchmetrics raises."""

    def compute(self) -> Tensor:
        """The score of all pictures so far."""
        return super().compute() if self.total > 1 else self.residual.new_tensor(torch.nan)


class SwinRegressor(HeadModule):
    """Train a Swin Transformer to read numbers off pictures.

    The loss is transformers' for ``problem_type="regression"``, on the numbers as they are stored; a new head starts at
    their mean. Bring them to a standard deviation about 1 where they are far from it. Metrics are the mean absolute
    error, the root of the mean squared error, and R2; of several numbers, over all of them (R2: the mean of theirs).

    The arguments and errors are those of :class:`~swin_hf.training.tasks.heads.HeadModule`; ``num_labels`` is how many
    numbers a picture has, and ``id2label`` has their names, by their place.
    """

    monitor = "val_mae"
    problem_type = "regression"
    default_labels = 1
    data_class = RegressionDataModule
    default_config = "regression"

    centre: Tensor

    def configure_metrics(self, labels: int) -> None:
        """Errors over all numbers and, in a test, of each."""
        errors: dict[str, Metric | MetricCollection] = {
            "mae": MeanAbsoluteError(),
            "rmse": MeanSquaredError(squared=False),
            "r2": Determination(),
        }
        metrics = MetricCollection(errors, compute_groups=False)
        self.val_metrics, self.test_metrics = metrics.clone(prefix="val_"), metrics.clone(prefix="test_")
        each: dict[str, Metric | MetricCollection] = {
            "mae": MeanAbsoluteError(labels),
            "rmse": MeanSquaredError(squared=False, num_outputs=labels),
        }
        self.test_each = MetricCollection(each, compute_groups=False)
        self.register_buffer("centre", torch.zeros(labels), persistent=False)

    def setup(self, stage: str) -> None:
        """Check the model against the data, and find the middle of its numbers, where a new head starts."""
        super().setup(stage)
        self.centre = torch.tensor(getattr(self.datamodule, "label_means", None) or self.centre.tolist())
        if stage == "fit":
            for name, parameter in self.model.named_parameters():
                if "classifier." in name and name.endswith("bias") and not parameter.any():
                    parameter.data.copy_(self.centre)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of one batch; ``labels`` are ``(B, num_labels)``."""
        loss = F.mse_loss(self(batch["pixel_values"]), batch["labels"])
        self.log_training(loss, len(batch["labels"]))
        return loss

    def evaluate(self, batch: dict[str, Tensor], split: str) -> dict[str, Tensor]:
        """Add a batch to the metrics of a split, and return its ``values`` ``(B, num_labels)``."""
        labels, values = batch["labels"], self(batch["pixel_values"]).float()
        metrics = getattr(self, f"{split}_metrics")
        getattr(self, f"{split}_loss").update(F.mse_loss(values, labels), weight=len(labels))
        # R2 sums squares in single precision, which is exact enough near 0 only.
        found, truth = values - self.centre, labels - self.centre
        metrics["mae"].update(found.flatten(), truth.flatten())
        metrics["rmse"].update(found.flatten(), truth.flatten())
        metrics["r2"].update(found, truth)
        if split == "test":
            self.test_each.update(found, truth)
        return {"values": values}

    def conclude(self, split: str) -> dict[str, list[float]]:
        """The errors of each number in a test."""
        if split == "val":
            return {}
        errors = {name: value.view(-1).tolist() for name, value in self.test_each.compute().items()}
        self.test_each.reset()
        return errors

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The numbers ``(B, num_labels)``."""
        return self.forward(batch["pixel_values"])

    @property
    def answer_columns(self) -> list[str]:  # type: ignore[override]
        """Label and prediction; of several numbers, two columns each."""
        names = self.class_names
        if len(names) == 1:
            return ["label", "prediction"]
        return [f"{column} {name}" for name in names for column in ("label", "prediction")]

    def answers(self, outputs: Any, labels: Tensor) -> list[tuple[Any, ...]]:
        """Each number, and what was predicted."""
        return [tuple(row) for row in torch.stack([labels, outputs["values"]], dim=-1).flatten(1).tolist()]

    def test_report(self) -> TestReport:
        """The errors of each number, where there are several."""
        report = super().test_report()
        names = [one_line(name, LONGEST_NAME) for name in self.class_names]
        if len(names) > 1:
            errors = zip(names, self.tested["mae"], self.tested["rmse"], strict=True)
            lines = [(name, f"{mae:.6g}", f"{rmse:.6g}") for name, mae, rmse in errors]
            report.table = text_table([("number", "MAE", "RMSE"), *lines])
        return report
