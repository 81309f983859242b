"""Logs: the CSV file that every run keeps, and Trackio, Hugging Face's tracker."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from swin_hf.files import redact, replacing


class AppendingCSVLogger(CSVLogger):
    """Lightning's ``metrics.csv``; a resumed run continues it instead of deleting it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer; the rows of an earlier part of the run are kept."""
        if self._experiment is None:
            self._experiment = WholeWriter(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def rewind(self, step: int, curves: dict[str, list[list[float]]]) -> None:
        """Restore the log of the moment when a checkpoint was written: rows of later steps go, they come again.

        Rows that a kill kept from the disk come back from the curves: name to ``[global step, value]`` points.
        """
        rows = [row for row in self.experiment.rows if int(row["step"]) < step]
        epochs = {int(row["step"]): row["epoch"] for row in rows if row.get("epoch")}
        known = {(name, int(row["step"])) for row in rows for name, value in row.items() if value not in ("", None)}
        lost: dict[tuple[str, int], dict[str, Any]] = {}  # train_ and val_ have rows of their own
        for name, points in curves.items():
            kind = name.split("_")[0]
            for at, value in points if kind in ("train", "val") else ():
                here = int(at) - 1  # Lightning counts the step that has just been taken from 0
                if (name, here) not in known:
                    lost.setdefault((kind, here), {"epoch": epochs.get(here, ""), "step": here})[name] = value
        self.experiment.rows = sorted([*rows, *lost.values()], key=lambda row: int(row["step"]))


class WholeTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoard log; ``hparams.yaml`` is written whole: Lightning never replaces a partial one."""

    @rank_zero_only
    def save(self) -> None:
        """Write the events to the disk, and the configuration once."""
        self.experiment.flush()
        path = Path(self.log_dir, self.NAME_HPARAMS_FILE)
        if not path.is_file():
            with replacing(path) as partial:
                save_hparams_to_yaml(partial, self.hparams)


class WholeWriter(ExperimentWriter):
    """Writes the whole table at once, so that a kill or a full disk loses no earlier row and leaves no partial one."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.rows = read_rows(Path(self.metrics_file_path))

    def _check_log_dir_exists(self) -> None:
        """Lightning's own deletes the log of the earlier part."""

    def save(self) -> None:
        """Write all rows, or leave the file as it was and raise :class:`~swin_hf.files.WriteError`."""
        if not self.metrics:
            return
        self.rows += self.metrics
        self.metrics = []
        names = sorted({name for row in self.rows for name in row})
        with replacing(self.metrics_file_path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            writer.writerows(self.rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a ``metrics.csv`` that may have been cut off anywhere."""
    if not path.is_file():
        return []
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith(("\r", "\n")):
        lines.pop()  # a number that was cut looks like a number
    rows = [row for row in csv.DictReader(lines) if None not in row and None not in row.values()]
    return [row for row in rows if row.get("step", "").isdecimal()]


class TrackioLogger(Logger):
    """Log to Trackio (https://huggingface.co/docs/trackio): local by default, in a Space when one is named.

    Args:
        project: Name of the project; ``trackio show --project NAME`` opens it.
        run_name: Name of the run; Trackio invents one when it is not given.
        space_id: Space that shows the dashboard, ``user/name``; local without it.
    """

    def __init__(self, project: str = "swin-hf", run_name: str | None = None, space_id: str | None = None) -> None:
        super().__init__()
        self.project, self.run_name, self.space_id = project, run_name, space_id
        self.config: dict[str, Any] = {}
        self.run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return self.project

    @property
    def version(self) -> str:
        """The run."""
        return self.run_name or "run"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The Trackio run, started when it is first needed."""
        if self.run is None:
            try:
                import trackio  # type: ignore[import-not-found]  # optional
            except ImportError as error:
                raise ImportError("this logger needs trackio: pip install trackio") from error
            where = {"project": self.project, "name": self.run_name, "space_id": self.space_id}
            self.run = trackio.init(**where, config=self.config, resume="allow", embed=False)
            self.run_name = self.run.name  # the test after the training goes on in the same run
        return self.run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the configuration for the start of the run."""
        self.config |= redact(vars(params) if isinstance(params, Namespace) else params)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log numbers of one step."""
        self.experiment.log({name: float(value) for name, value in metrics.items()}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish the run."""
        if self.run is not None:
            self.run.finish()
            self.run = None
