"""What a test answered for each picture: ``predictions.csv`` in the run folder."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from swin_hf.files import replacing

from .data.sampling import gathered

NAME = "predictions.csv"


class Predictions(Callback):
    """Writes a line for each picture of a test that could be read, in the order of the data, and says where.

    The columns after ``path`` are the ``answer_columns`` of the task; a task without them gets no file. The folder is
    that of the run, or what makes it.
    """

    def __init__(self, folder: Path | Callable[[], Path]) -> None:
        self.folder = folder
        self.rows: list[tuple[tuple[int, int], str, tuple[Any, ...]]] = []  # place in the data, name, answer
        self.written: Path | None = None

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Forget the answers of an earlier test."""
        self.rows = []

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Keep the answers."""
        if pl_module.answer_columns and outputs:
            sources = trainer.datamodule.batch_sources
            for (row, name), answer in zip(sources, pl_module.answers(outputs, batch["labels"]), strict=True):
                self.rows.append(((row, trainer.global_rank), name, answer))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Gather the answers of all processes."""
        self.rows = gathered(self.rows)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the file, on rank 0."""
        if not (pl_module.answer_columns and trainer.is_global_zero) or trainer.fast_dev_run:
            return
        path = (self.folder if isinstance(self.folder, Path) else self.folder()) / NAME
        with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("path", *pl_module.answer_columns))
            for _, name, answer in sorted(self.rows, key=lambda row: row[0]):
                writer.writerow((name, *(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in answer)))
        self.written = path

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Say where, after Lightning's table of results."""
        if self.written is not None:
            print(f"predictions: {self.written}", flush=True)  # noqa: T201 - the result
            self.written = None
