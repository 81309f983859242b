"""What a run shows while it trains: a line for each epoch and pictures in TensorBoard."""

# mypy: disable-error-code="attr-defined"
# Lightning sets attributes of its Trainer dynamically and re-exports names without saying so.

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor

from swin_hf.files import replacing

from .figures import to_pixels


class EpochReport(Callback):
    """Prints one line for each epoch and logs the training speed."""

    def __init__(self) -> None:
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
        if trainer.is_global_zero:
            line = self.line(trainer, metrics, speed, seconds)
            bar = trainer.progress_bar_callback
            if bar is None:
                print(line, flush=True)  # noqa: T201 - the report
            else:
                bar.print(line)  # above the bar

    def line(self, trainer: Trainer, metrics: dict[str, float], speed: float, seconds: float) -> str:
        """The line of an epoch."""
        names = dict.fromkeys(("train_loss", "val_loss", getattr(trainer.lightning_module, "monitor", "val_loss")))
        shown = [f"{name} {metrics[name]:.4f}" for name in names if name in metrics]
        rate = trainer.optimizers[0].param_groups[-1]["lr"]
        pace = f"  {speed:,.0f} images/s  {seconds:.1f} s" if self.images else ""
        return f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}  {'  '.join(shown)}  lr {rate:.2e}{pace}"


def to_pictures(pixel_values: Tensor, datamodule: Any) -> np.ndarray[Any, Any]:
    """Undo the normalisation: ``(B, C, H, W)`` to ``(B, H, W, 3)`` in [0, 1]."""
    processor = datamodule.image_processor()
    shape = (1, -1, 1, 1)
    mean = torch.tensor(processor.image_mean).view(shape)
    std = torch.tensor(processor.image_std).view(shape)
    pictures = (pixel_values.detach().float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return np.repeat(pictures, 3, axis=-1) if pictures.shape[-1] == 1 else pictures


@rank_zero_only
def show_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Put a figure into every TensorBoard log of the run."""
    boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if boards:
        pixels = to_pixels(figure)
        for board in boards:
            board.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def keep_figure(trainer: Trainer, folder: Path | None, name: str, draw: Callable[[], Figure]) -> None:
    """Draw a figure for the run folder and TensorBoard; a figure that fails is a warning, the results are safe."""
    try:
        figure = draw()
        if folder is not None:
            save_figure(figure, folder / f"{name}.png")
        show_figure(trainer, name, figure)
    except Exception as error:
        warnings.warn(f"the figure {name} could not be drawn, the run goes on without it: {error}", stacklevel=2)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def log_configuration(trainer: Trainer, configuration: dict[str, Any]) -> None:
    """Hand the whole configuration to the loggers that show one; the CSV log has ``config.yaml`` in its folder."""
    for logger in trainer.loggers:
        if not isinstance(logger, CSVLogger):
            logger.log_hyperparams(configuration)
