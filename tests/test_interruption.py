"""An interrupted run is whole: what is saved, what is left, who is told, and how it goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PATIENCE, TRAINING_WARNINGS
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_callbacks import Line
from test_training import CONFIG, fit
from torch.utils.data import DataLoader

from swin_hf.files import WriteError
from swin_hf.training import EMA, LastCheckpoint
from swin_hf.training.checkpointing import BestCheckpoint
from swin_hf.training.run_folder import last_run, new_run_folder

pytestmark = [
    *TRAINING_WARNINGS,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture
def config(tmp_path):
    """A run of 3 steps an epoch."""
    values = {**CONFIG, "data": CONFIG["data"] | {"splits": {"limit_train": 48}, "num_workers": 0}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Raise(Callback):
    """Raises an exception at a hook of a step."""

    def __init__(self, hook, exception, step=None):
        def fail(trainer, *_):
            if not trainer.sanity_checking and step in (None, trainer.global_step):
                raise exception

        setattr(self, hook, fail)


def train(folder, *callbacks, test=False):
    """Train a :class:`Line` for two epochs of four steps."""
    module = Line()
    module.test_step = lambda batch, index: None
    runner = Trainer(
        default_root_dir=folder, accelerator="cpu", max_epochs=2, logger=False, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(torch.zeros(4, 1))
    runner.fit(module, loader, loader)
    if test:
        runner.test(module, loader, ckpt_path=str(folder / "best.ckpt"), weights_only=True, verbose=False)


@pytest.mark.parametrize(
    ("hook", "exception"),
    [
        ("on_test_batch_end", SIGTERMException()),
        ("on_test_batch_end", KeyboardInterrupt()),
        ("on_test_start", RuntimeError("no memory")),
        ("on_fit_end", KeyboardInterrupt()),  # the module has the averaged weights by then
    ],
)
def test_an_interruption_after_the_training_leaves_its_last_state(tmp_path, hook, exception):
    best = BestCheckpoint(str(tmp_path), mode="min")  # the first epoch
    with pytest.raises(BaseException):  # noqa: B017 - whatever it is
        train(tmp_path, EMA(0.5), Raise(hook, exception), best, LastCheckpoint(str(tmp_path)), test=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
    assert torch.equal(saved["current_model_state"]["weight"], torch.full((3,), 8.0))


@pytest.mark.parametrize(
    "exception",
    [ConnectionError("lost"), TimeoutError("slow"), FileNotFoundError(2, "gone", "a.png"), OSError("broken picture")],
)
def test_an_error_of_reading_in_mid_epoch_is_saved_as_any_other(tmp_path, exception):
    with pytest.raises(type(exception)):
        train(tmp_path, Raise("on_train_batch_start", exception, step=6), LastCheckpoint(str(tmp_path)))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6


def test_only_an_error_of_writing_saves_nothing(tmp_path):
    with pytest.raises(WriteError):
        train(tmp_path, Raise("on_train_batch_start", WriteError("full"), step=6), LastCheckpoint(str(tmp_path)))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


FAILING = """
import sys
from swin_hf.training import SwinClassifier, run_recipe

class Failing(SwinClassifier):
    def {hook}(self, *_):
        if self.trainer.global_rank == {rank} and self.trainer.global_step >= 4:
            raise {exception}

if __name__ == "__main__":
    sys.exit(run_recipe(Failing, sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "hook", "exception"),
    [
        (1, "on_train_batch_start", "OSError('the share of rank 1 is gone')"),
        (0, "on_train_batch_start", "OSError('the share of rank 0 is gone')"),
        (1, "on_validation_batch_start", "RuntimeError('no memory on 1')"),
        (0, "on_validation_batch_start", "RuntimeError('no memory on 0')"),
    ],
)
def test_an_exception_on_one_rank_ends_all_with_its_message(config, tmp_path, rank, hook, exception):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(hook=hook, rank=rank, exception=exception))
    words = ["fit", "--config", str(config), "--runs", str(tmp_path / "runs"), "--data.batch_size", "8"]
    words += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    process = subprocess.Popen(
        [sys.executable, script, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=PATIENCE)  # the timeout of a collective is longer: 30 minutes
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode not in (0, None)
    assert exception.split("'")[1] in output
    assert torch.load(tmp_path / "runs/tiny/checkpoints/last.ckpt", weights_only=True)["global_step"] in (3, 6)


def test_runs_that_start_at_the_same_moment_get_folders_of_their_own(tmp_path):
    code = "import sys, time; from pathlib import Path; from swin_hf.training.run_folder import new_run_folder\n"
    code += f"time.sleep(max(0, {time.time() + 12} - time.time())); print(new_run_folder(Path(sys.argv[1]), 'seed'))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    found = {run.communicate(timeout=PATIENCE)[0].strip() for run in runs}
    assert found == {str(tmp_path / name) for name in ("seed", "seed-v2", "seed-v3")}


def test_threads_that_reserve_folders_never_share_one(tmp_path):
    found: list[Path] = []
    meet = threading.Barrier(8)

    def reserve():
        meet.wait()
        found.append(new_run_folder(tmp_path, "sweep"))

    threads = [threading.Thread(target=reserve) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(set(found)) == 8 and all(path.is_dir() for path in found)


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_a_rank_that_starts_late_makes_no_folder(tmp_path, monkeypatch, variable):
    first = new_run_folder(tmp_path, "tiny")
    monkeypatch.setenv(variable, "1")
    new_run_folder(tmp_path, "tiny")
    assert list(tmp_path.iterdir()) == [first]


def test_last_is_the_newest_folder_with_a_checkpoint(tmp_path):
    assert last_run(tmp_path, "r") is None
    for name, whole in (("r", True), ("r-v2", True), ("r-v9", False), ("r-v10", True), ("r-v11", False), ("rr", True)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        if whole:
            (tmp_path / name / "checkpoints" / "last.ckpt").touch()
    assert last_run(tmp_path, "r") == tmp_path / "r-v10"  # by number, not by letters
    assert new_run_folder(tmp_path, "r") == tmp_path / "r-v12"


def test_last_passes_over_a_failed_attempt_and_says_where_it_found_nothing(config, tmp_path, capsys):
    runs = tmp_path / "runs"
    words = ["--config", str(config), "--ckpt_path", "last"]
    assert fit(config, runs, *words, "--trainer.max_epochs", "1") == 0
    assert "no run tiny in" in capsys.readouterr().out
    (runs / "tiny-v2").mkdir()  # an attempt that was killed before its first checkpoint
    assert fit(config, runs, *words, "--trainer.max_epochs", "2") == 0
    output = capsys.readouterr().out
    assert "epoch   2/2" in output and "epoch   1/2" not in output
    assert torch.load(runs / "tiny/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert not list((runs / "tiny-v2").iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--model.preset", "nothing"],  # before the trainer is there
        ["--trainer.max_epochs", "-1"],  # in the trainer, before the first step
        ["--data.data_files.train", "nowhere.parquet"],
    ],
)
@pytest.mark.parametrize("there", ["", "mine", "mine/runs"])
def test_a_run_that_fails_before_its_first_step_leaves_no_folder(config, tmp_path, words, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = list(tmp_path.rglob("*"))
    try:
        assert fit(config, tmp_path / "mine" / "runs", *words) == 1
    except SystemExit as error:
        assert str(error).startswith("error: ")
    assert list(tmp_path.rglob("*")) == before


def test_a_finished_run_that_is_resumed_leaves_no_new_folder(config, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert fit(config, runs, "--trainer.max_epochs", "1") == 0
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    path = str(runs / "tiny/checkpoints/last.ckpt")
    assert fit(config, runs, "--config", str(config), "--ckpt_path", path, "--trainer.max_epochs", "1") == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()} == before
    assert [path.name for path in runs.iterdir()] == ["tiny"]


def test_what_a_kill_left_is_swept_at_the_next_start(config, tmp_path):
    runs = tmp_path / "runs"
    assert fit(config, runs, "--trainer.max_epochs", "1") == 0
    run = runs / "tiny"
    left = [run / ".worst_pictures.png.77.partial", run / "model" / ".training_facts.json.77.partial"]
    left += [run / "checkpoints" / ".last.ckpt.77.partial", run / ".model.77.partial" / "config.json"]
    left += [run / ".best.ckpt.77", run / "model" / "training_facts.77.tmp", run / "split.json.tmp"]  # older names
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    assert fit(config, runs, "--config", str(config), "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert not [path for path in run.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
