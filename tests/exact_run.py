"""Small, complete training runs that leave a trace; run in-process by tests, or as one of several ranks.

As a program (``python exact_run.py FOLDER OPTIONS_AS_JSON``, with the environment that a launcher sets) it trains an
unbroken run, resumes it from a checkpoint written in the middle of an epoch, validates, and leaves what it saw on
this rank in ``FOLDER/rank<N>.pt``.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from short import short

import swin_hf
from swin_hf.training import ImageDataModule, SwinClassifier

DIGITS = Path(swin_hf.__file__).parent / "training" / "configs" / "digits"
EPOCHS = 2


class Trace(Callback):
    """Records the batches as the model gets them, and saves checkpoints where it is told to."""

    def __init__(self, save: dict[str, Callable[[Trainer, str], bool]] | None = None, folder: Path | None = None):
        self.batches: dict[tuple[int, int], tuple[float, list[int]]] = {}
        self.draws: list[float] = []
        self.save, self.folder = save or {}, folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pixels = batch["pixel_values"].double().sum().item()
        self.batches[trainer.current_epoch, batch_idx] = (pixels, batch["labels"].tolist())
        state = torch.get_rng_state()
        self.draws.append(torch.rand(()).item())
        torch.set_rng_state(state)

    def _checkpoint(self, trainer, hook):
        for name, wanted in self.save.items():
            if wanted(trainer, hook):
                trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self._checkpoint(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            self._checkpoint(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self._checkpoint(trainer, "epoch")


def data(**options: Any) -> ImageDataModule:
    """The digits, with everything random switched on."""
    return short(
        ImageDataModule,
        **{
            "dataset": "parquet",
            "data_files": {"train": str(DIGITS / "train.parquet"), "test": str(DIGITS / "test.parquet")},
            "image_size": 16,
            "batch_size": 8,
            "num_workers": 0,
            "limit_train": 64,
            "validation_fraction": 0.026,
            "auto_augment": "trivialaugment",
            "erasing": 0.5,
            "seed": 3,
        }
        | options,
    )


def classifier(**options: Any) -> SwinClassifier:
    """A very small Swin with stochastic depth and Mixup, alike on every rank."""
    seed_everything(1, verbose=False)
    return short(
        SwinClassifier,
        preset="swin_digits_patch4_window4_32",
        image_size=16,
        num_labels=10,
        drop_path_rate=0.4,
        overrides={"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "hidden_dropout_prob": 0.1},
        learning_rate=2e-2,
        warmup_epochs=0.5,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        **options,
    )


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """A quiet trainer on the CPU."""
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": EPOCHS,
            "logger": False,
            "callbacks": list(callbacks),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(folder),
        }
        | options
    )


def fit(
    folder: Path,
    save: dict[str, Callable[[Trainer, str], bool]] | None = None,
    resume: str | None = None,
    data_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Trace, dict[str, torch.Tensor], Trainer]:
    """Train and return the trace, the final weights and the trainer."""
    trace = Trace(save, folder)
    module = classifier()
    runner = trainer(folder, trace, **options)
    checkpoint = str(folder / f"{resume}.ckpt") if resume else None
    runner.fit(module, data(**(data_options or {})), ckpt_path=checkpoint)
    return trace, {name: value.clone() for name, value in module.state_dict().items()}, runner


def middle(batch: int, epoch: int = 0) -> Callable[[Trainer, str], bool]:
    """Whether ``batch`` batches of ``epoch`` have just been trained on."""

    def wanted(trainer: Trainer, hook: str) -> bool:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        return hook == "batch" and trainer.current_epoch == epoch and done == batch

    return wanted


def launch(folder: Path, ranks: int, **options: Any) -> list[dict[str, Any]]:
    """Run this file in ``ranks`` processes with gloo; return what each of them left."""
    from conftest import PATIENCE

    processes = []
    port = str(20000 + os.getpid() % 20000)
    for rank in range(ranks):
        environment = os.environ | {
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, str(folder), json.dumps(options)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=PATIENCE)[0].decode(errors="replace"))
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * ranks, "\n".join(outputs)[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def main(folder: Path, options: dict[str, Any]) -> None:
    """One rank of a distributed comparison."""
    warnings.simplefilter("ignore")  # this process is judged by what it leaves
    torch.set_num_threads(1)
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    parallel = {"strategy": "ddp", "devices": world_size, **options.get("trainer", {})}
    data_options = options.get("data", {})
    save = {"middle": middle(options.get("middle", 2)), "late": middle(1, epoch=1)}
    whole, weights, _ = fit(folder, save, data_options=data_options, **parallel)
    results: dict[str, Any] = {"whole": whole.batches, "draws": whole.draws, "weights": weights}
    for name in options.get("resume", ["middle"]):
        trace, again, _ = fit(folder, resume=name, data_options=data_options, **parallel)
        results[name] = trace.batches
        results[f"{name}_weights"] = again
    module = classifier()
    runner = trainer(folder, **parallel, precision="64-true")
    results["metrics"] = runner.validate(module, data(**data_options), verbose=False)[0]
    results["logged"] = {name: value.item() for name, value in runner.callback_metrics.items()}
    torch.save(results, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
