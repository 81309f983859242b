"""What a run shows while it trains: a bar on a terminal, a line for each epoch, and figures."""

import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

from swin_hf.explain import as_seen
from swin_hf.files import replacing
from swin_hf.processing import as_rgb

from .data.sampling import ResumableLoader

REFRESH_SECONDS = 0.25
WARM_UP, FEWEST = 2, 10  # batches: not measured, for workers start and kernels are compiled; measured at least


class TrainingBar(TQDMProgressBar):
    """Lightning's bar with the time left until the end of the training.

    It is drawn a few times a second: a number that is shown has to be fetched from the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn = self.started = 0.0
        self.first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self.started, self.first_step = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """The metrics of the bar, and the time left until the last epoch ends."""
        items = {name.removesuffix("_step"): value for name, value in super().get_metrics(trainer, pl_module).items()}
        items.pop("v_num", None)
        done = trainer.global_step - self.first_step
        if done > 0 and trainer.training:
            _, total = pl_module.planned_steps()
            seconds = (time.monotonic() - self.started) / done * (total - trainer.global_step)
            items["left"] = str(timedelta(seconds=round(max(seconds, 0))))
        return items

    def _should_update(self, current: int, total: int) -> bool:
        if current != total and time.monotonic() - self.drawn < REFRESH_SECONDS:
            return False
        self.drawn = time.monotonic()
        return self.is_enabled


class EpochReport(Callback):
    """Prints one line for each epoch and logs the training speed; after the first epoch, also who waits for whom."""

    def __init__(self) -> None:
        self.images = self.batches = 0
        self.started = self.ended = 0.0
        self.is_first = False
        self.warm = (0, 0.0, 0.0, 0.0)  # what there was after the first batches, see `counts`

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock; an epoch that is resumed in its middle has no other start."""
        self.is_first = True
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self.images = self.batches = 0
        self.started = self.ended = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count images; the last batch stops the clock, before validation."""
        if self.is_first and pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # what is still computed while the loader is waited for is not waiting
        self.images += len(batch["pixel_values"])
        self.batches += 1
        self.ended = time.perf_counter()
        if self.batches == WARM_UP:
            self.warm = self.counts(trainer)

    def counts(self, trainer: Trainer) -> tuple[int, float, float, float]:
        """Images, the clock, and the seconds that batches were read (by all workers of this rank) and waited for."""
        loader: Any = trainer.train_dataloader
        seconds = getattr(loader, "read_seconds", 0.0), getattr(loader, "waited_seconds", 0.0)
        return self.images, self.ended, *seconds

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the speed of the epoch, and print its line."""
        seconds = max(self.ended - self.started, 1e-9)
        speed = self.images * trainer.world_size / seconds
        if self.images:  # none where the run was interrupted after them
            pl_module.log("train_images_per_s", speed, rank_zero_only=False, sync_dist=False)
        metrics = dict(trainer.callback_metrics)  # on every rank: reading them gathers the values of all
        names = dict.fromkeys(("train_loss", "val_loss", getattr(pl_module, "monitor", "val_loss")))
        shown = "  ".join(f"{name} {float(metrics[name]):.4f}" for name in names if name in metrics)
        rate = trainer.optimizers[0].param_groups[-1]["lr"]
        pace = f"  {speed:,.0f} images/s  {seconds:.1f} s" if self.images else ""
        of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""  # with max_steps alone, it is unknown
        line = f"epoch {trainer.current_epoch + 1:>3}{of}  {shown}  lr {rate:.2e}{pace}"
        lines = [line, *self.who_waits(trainer)]
        if trainer.is_global_zero:
            bar = trainer.progress_bar_callback  # the lines come above it
            show = partial(print, flush=True) if bar is None else bar.print
            show("\n".join(lines))

    def who_waits(self, trainer: Trainer) -> list[str]:
        """The line of the first epoch on the loader and the model, of all ranks; none after too few batches."""
        is_told, self.is_first = self.is_first and self.batches >= WARM_UP + FEWEST, False
        if not is_told or not isinstance(trainer.train_dataloader, ResumableLoader):
            return []
        workers = trainer.train_dataloader.num_workers
        images, seconds, read, waited = (
            after - before for before, after in zip(self.warm, self.counts(trainer), strict=True)
        )
        rates = [images * max(1, workers) / max(read, 1e-9), images / max(seconds - waited, 1e-9), waited / seconds]
        sums = trainer.strategy.reduce(torch.tensor(rates, device=trainer.strategy.root_device), reduce_op="sum")
        loader, model, share = (float(number) for number in sums)
        share /= trainer.world_size
        who = f"the model waits {share:.0%} of the time" if workers == 0 or loader < model else "the loader waits"
        return [f"loader {loader:,.0f} images/s ({workers} workers), model {model:,.0f} images/s: {who}"]


def to_pictures(pixel_values: Tensor, datamodule: Any) -> np.ndarray[Any, Any]:
    """Undo the normalisation: ``(B, C, H, W)`` to ``(B, H, W, 3)`` in [0, 1]; of many channels, the first three."""
    if pixel_values.shape[1] not in (1, 3):
        return np.stack([np.asarray(as_rgb(picture)) / 255 for picture in pixel_values.detach().float().cpu()])
    pictures = as_seen(pixel_values.detach(), datamodule.image_processor()).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return np.repeat(pictures, 3, axis=-1) if pictures.shape[-1] == 1 else pictures


def keep_figure(trainer: Trainer, folder: Path | None, name: str, draw: Callable[[], Figure]) -> None:
    """Draw a figure for the run folder and TensorBoard; an error is a warning, because the results are saved."""
    try:
        figure = draw()
        if folder is not None:
            with replacing(folder / f"{name}.png") as path:
                figure.savefig(path, format="png", dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, to_pixels(figure), trainer.global_step, dataformats="HWC")
    except Exception as error:
        warnings.warn(f"the figure {name} could not be drawn, the run goes on without it: {error}", stacklevel=2)


def to_pixels(figure: Figure, dpi: int = 100) -> np.ndarray[Any, Any]:
    """A figure as ``(H, W, 3)`` ``uint8`` pixels, for TensorBoard."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
