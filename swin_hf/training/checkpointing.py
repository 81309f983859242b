"""What keeps the weights of a run: averages, checkpoints, and the guard against weights that are not finite."""

import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from swin_hf.files import WriteError, replacing
from swin_hf.ranges import check_range


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step."""


def best_checkpoint(trainer: Trainer) -> "BestCheckpoint | None":
    """The callback that keeps the best weights of a run, where it has one."""
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)), None)


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
        check_range("decay", decay, "(0, 1)")
        check_range("every_n_steps", every_n_steps, "[1, inf)")
        self.decay, self.warmup, self.every_n_steps = decay, warmup, every_n_steps
        self.swapped = False  # whether the module has the average and the average model the current weights
        super().__init__(use_buffers=False, multi_avg_fn=self.average)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Create the average; refuse to average weights of 16 bits."""
        if stage == "fit" and trainer.precision in ("16-true", "bf16-true"):
            raise ValueError(
                f"EMA of 16-bit weights (trainer.precision {trainer.precision}) never moves: a step of it is smaller "
                "than they can hold; use trainer.precision bf16-mixed, whose weights are float32"
            )
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both sets of weights to continue a training; a test needs the average, which is loaded already."""
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
    """Writes a checkpoint under a temporary name and renames it when it is complete and on the disk.

    Lightning's own copies it from the folder of temporary files, which a full disk or a kill leaves half done.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file, or leave everything as it was and raise :class:`~swin_hf.files.WriteError`."""
        with replacing(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


class AtomicCheckpoint(ModelCheckpoint):
    """A checkpoint whose file is replaced when its successor is complete."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write through :class:`AtomicCheckpointIO`, unless the strategy has a way of its own."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()


class LastCheckpoint(AtomicCheckpoint):
    """Keeps ``last.ckpt``, the whole state of the run, at every epoch and when the training is interrupted.

    After a loss that is not finite nothing is saved, so that the last good state stays; nor after an interruption of
    the test that follows the training, when the module has the best weights and not the last. Of several ranks, the
    state is saved when they stop together (SIGTERM): a rank that fails alone would wait for the others.

    Args:
        dirpath: Folder of the checkpoints.
        every_n_train_steps: Optimiser steps between two checkpoints, instead of one per epoch.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=self.CHECKPOINT_NAME_LAST,
            save_on_exception=True,
            save_on_train_epoch_end=None if every_n_train_steps else True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self.training = False  # whether the module and the trainer hold a state of the training
        self.validated = False  # whether the weights at hand have been validated

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, the module and the trainer hold a state of the training."""
        super().on_train_start(trainer, pl_module)
        self.training = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last epoch is saved; what follows (the averaged weights, the test of the best) is another state."""
        super().on_train_end(trainer, pl_module)
        self.training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state; end the other ranks, which only this process, whose launcher started them, can end."""
        alone = trainer.world_size > 1 and not isinstance(exception, SIGTERMException)
        if self.training and not alone and not isinstance(exception, NonFiniteLossError | WriteError):
            try:
                super().on_exception(trainer, pl_module, exception)
            except WriteError as error:  # the reason of the interruption must not be lost
                warnings.warn(f"the state of the interrupted epoch is not saved: {error}", stacklevel=2)
        self.training = False
        if alone and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            trainer.strategy.launcher.kill(signal.SIGKILL)  # a rank in a collective hears no other signal

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the folder that the state names; in another folder, start anew."""
        if str(self.dirpath) == str(state_dict["dirpath"]):
            super().load_state_dict(state_dict)

    def on_train_batch_start(self, *_: Any) -> None:
        """The weights change, so they have not been validated."""
        self.validated = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The metrics of these weights are complete."""
        self.validated = not trainer.sanity_checking

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make a resumed run repeat an interrupted validation from its start; Lightning would take it for complete."""
        if trainer.validating and not self.validated:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress["is_last_batch"] = False
            for tracker in ("total", "current"):  # in the middle of its first batch
                progress[tracker].update(ready=1, started=1, processed=0, completed=0)


class BestCheckpoint(AtomicCheckpoint):
    """Keeps ``best.ckpt`` in a folder: the state with the best validation metric, the ``max`` or ``min`` of it."""

    def __init__(self, dirpath: str | None = None, monitor: str = "val_accuracy", mode: str = "max") -> None:
        super().__init__(dirpath=dirpath, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)
        self.pending = False  # whether weights have been validated that are not yet compared with the best
        self.unwritten: str | None = None  # the file, while it is being written

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The validated weights have not been compared with the best yet."""
        self.pending = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the weights with the best, unless that was done before an interruption."""
        if self.pending:
            super().on_train_epoch_end(trainer, pl_module)
        self.pending = False

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.unwritten = filepath
        super()._save_checkpoint(trainer, filepath)
        self.unwritten = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Compare the weights that were validated last: a run that resumes does not validate them again."""
        if not self.pending or trainer.world_size > 1 or isinstance(exception, WriteError | NonFiniteLossError):
            return
        if self.unwritten is None:
            self.on_train_epoch_end(trainer, pl_module)
        else:
            self._save_checkpoint(trainer, self.unwritten)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the best so far, also in another folder: of another run, or of this one after it was moved."""
        score, there = state_dict["best_model_score"], Path(state_dict["best_model_path"] or "nothing")
        if score is not None and self.dirpath is not None and str(self.dirpath) != str(state_dict["dirpath"]):
            here = Path(self.dirpath) / "best.ckpt"
            if not here.is_file() and there.is_file() and rank_zero_only.rank == 0:
                with replacing(here) as partial:
                    shutil.copyfile(there, partial)
            if here.is_file() or there.is_file():
                moved = {"dirpath": self.dirpath, "best_k_models": {str(here): score}}
                state_dict = state_dict | moved | dict.fromkeys(("best_model_path", "kth_best_model_path"), str(here))
        super().load_state_dict(state_dict)


class NonFiniteGuard(Callback):
    """Stops a run whose loss or weights are NaN or infinite, and keeps such weights out of every checkpoint.

    The loss stays on the device; it is looked at every ``every_n_steps`` batches (each look waits for the device) and
    before anything is saved, when the weights are looked at too: the last step may have spoilt them.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self.first_bad: Tensor | None = None  # global step, -1 while all is well

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run."""
        self.first_bad = torch.full((), -1, dtype=torch.long, device=pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the first step with a bad loss; check the record every ``every_n_steps`` batches."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None or self.first_bad is None:
            return
        bad = ~torch.isfinite(loss.detach()).all() & (self.first_bad < 0)
        self.first_bad = torch.where(bad, trainer.global_step, self.first_bad)
        if (batch_idx + 1) % self.every_n_steps == 0:
            self.look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Any = None) -> None:
        """Check before a checkpoint is written, and before the metrics can choose these weights."""
        self.look(trainer, pl_module)

    on_validation_start = on_train_epoch_end = on_save_checkpoint

    def look(self, trainer: Trainer, pl_module: LightningModule | None = None) -> None:
        """Raise on every process when any of them has met a bad loss, or has bad weights in a module that is given."""
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
        kept = [c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)]
        back = "".join(f"; the last good state is {path}" for path in filter(None, kept))
        raise NonFiniteLossError(
            f"the {what} step {step}{back}; lower learning_rate, lengthen the warm-up, "
            "or use trainer.precision bf16-mixed instead of 16-mixed"
        )
