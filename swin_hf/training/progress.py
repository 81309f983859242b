"""The bar of a run on a terminal: loss, accuracy, and the time that is left of the epoch and of the whole training."""

# mypy: disable-error-code="attr-defined"
# Lightning sets attributes of its Trainer dynamically and re-exports names without saying so.

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

REFRESH_SECONDS = 0.25


class TrainingBar(TQDMProgressBar):
    """Lightning's bar, drawn a few times a second: a number that is shown has to be fetched from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = self.started = 0.0
        self.first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self.started, self.first_step = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The metrics of the bar, and the time left until the last epoch ends."""
        items = {name.removesuffix("_step"): value for name, value in super().get_metrics(trainer, pl_module).items()}
        items.pop("v_num", None)
        done = trainer.global_step - self.first_step
        if done > 0 and trainer.training:
            _, total = pl_module.planned_steps()  # type: ignore[operator]  # it is a SwinModule
            seconds = (time.monotonic() - self.started) / done * (total - trainer.global_step)
            items["left"] = str(timedelta(seconds=round(max(seconds, 0))))
        return items

    def _should_update(self, current: int, total: int) -> bool:
        if current != total and time.monotonic() - self.drawn < REFRESH_SECONDS:
            return False
        self.drawn = time.monotonic()
        return self.is_enabled
