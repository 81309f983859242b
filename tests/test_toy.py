"""A family is one row, and a task is one row and a module: nothing else of the package has to know."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_new_family_and_a_new_task_train_travel_and_load(tmp_path, hub):
    """In a process of its own: the tables are read when the rooms are imported."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    words = [sys.executable, str(Path(__file__).with_name("toy.py")), str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a table of its own" in done.stdout and "the toy works" in done.stdout
