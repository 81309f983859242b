"""Trackio, as it is installed: what a run logs is in its database, and nothing secret."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from swin_hf.training import TrackioLogger
logger = TrackioLogger("digits")
logger.log_hyperparams({"weights": "/home/ann/models/best", "hub_token": "hf_abcdefghijkl", "rate": 1e-3})
logger.log_metrics({"val_loss": 0.5}, step=3)
logger.finalize("success")
logger.log_metrics({"test_accuracy": 0.875}, step=4)
print("name", logger.name, logger.version)
logger.finalize("success")
"""


def test_trackio_has_the_training_and_its_test_in_one_run(tmp_path):
    pytest.importorskip("trackio", reason="an optional logger")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    with sqlite3.connect(tmp_path / "digits.db") as tables:
        rows = tables.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
        ((run, config),) = tables.execute("SELECT run_name, config FROM configs").fetchall()
    assert f"name digits {run}" in done.stdout
    assert [(name, step, json.loads(values)) for name, step, values in rows] == [
        (run, 3, {"val_loss": 0.5}),
        (run, 4, {"test_accuracy": 0.875}),
    ]
    told = {name: value for name, value in json.loads(config).items() if not name.startswith("_")}
    assert told == {"weights": "best", "hub_token": "***", "rate": 1e-3}
