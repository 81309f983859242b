"""Logs: the CSV file that every run keeps, and Trackio, Hugging Face's tracker."""

# mypy: disable-error-code="attr-defined"
# Lightning sets attributes of its Trainer dynamically and re-exports names without saying so.

import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from swin_hf.files import redact


class AppendingCSVLogger(CSVLogger):
    """Lightning's ``metrics.csv``, which goes on where an interrupted run stopped instead of being deleted."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer; the rows of an earlier part of the run are kept."""
        if self._experiment is None:
            path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
            aside = path.with_suffix(".earlier")
            if path.is_file():
                path.replace(aside)
            with warnings.catch_warnings():
                # Lightning warns that it will delete the earlier log; it is out of reach.
                warnings.filterwarnings("ignore", "Experiment logs directory .* exists")
                self._experiment = ExperimentWriter(log_dir=self.log_dir)
            if aside.is_file():
                aside.replace(path)
                with path.open() as file:
                    self._experiment.metrics_keys = file.readline().strip().split(",")
        return self._experiment


class TrackioLogger(Logger):
    """Log to Trackio (https://huggingface.co/docs/trackio): local by default, in a Space when one is named.

    Args:
        project: Name of the project; ``trackio show --project NAME`` opens it.
        run_name: Name of the run; Trackio invents one when it is not given.
        space_id: Space that shows the dashboard, ``user/name``; local without it.
    """

    def __init__(self, project: str = "swin-hf", run_name: str | None = None, space_id: str | None = None) -> None:
        super().__init__()
        self.project = project
        self.run_name = run_name
        self.space_id = space_id
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
            self.run = trackio.init(
                project=self.project,
                name=self.run_name,
                space_id=self.space_id,
                config=self.config,
                resume="allow",
                embed=False,
            )
            self.run_name = self.run.name  # the test after the training goes on in the same run
        return self.run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Keep the configuration for the start of the run."""
        values = vars(params) if isinstance(params, Namespace) else params
        self.config |= redact(values)

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
