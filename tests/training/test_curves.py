"""The recorded curves of a run that was interrupted are those of one that was not."""

import csv
import itertools
import json
import shutil
import signal

import pytest
import torch
from conftest import TRAINING_WARNINGS
from exact_run import classifier, data, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from swin_hf.training import EMA, LastCheckpoint, RunRecord
from swin_hf.training.callbacks import EpochReport
from swin_hf.training.checkpointing import BestCheckpoint, NonFiniteGuard
from swin_hf.training.loggers import AppendingCSVLogger, WholeWriter, read_rows

pytestmark = [
    *TRAINING_WARNINGS,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

SPEED = "train_images_per_s"


class SaveAt(Checkpoint):
    """Writes a checkpoint, and keeps the log of that moment, at three moments of the second epoch."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, name):
        if trainer.current_epoch == 1 and not trainer.sanity_checking and not (self.folder / f"{name}.ckpt").exists():
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")
            shutil.copy(self.folder / "metrics.csv", self.folder / f"{name}.csv")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            self.save(trainer, "training")

    def on_validation_batch_start(self, trainer, *_):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "end")


def run(folder, *callbacks, resume=None, **options):
    """Train three epochs; return the curves and the rows of the log."""
    record = RunRecord()
    logger = AppendingCSVLogger(str(folder), name="", version="")
    given = {"logger": logger, "max_epochs": 3, "enable_checkpointing": bool(callbacks)} | options
    runner = trainer(folder, record, *callbacks, **given)
    runner.fit(classifier(), data(), ckpt_path=None if resume is None else str(resume))
    return record, read_rows(folder / "metrics.csv")


def comparable(rows):
    return sorted(
        (int(row["step"]), name, float(value)) for row in rows for name, value in row.items() if value and name != SPEED
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    record, rows = run(folder, SaveAt(folder))
    return folder, record, rows


@pytest.mark.parametrize(
    ("name", "log"),
    [
        ("training", "at the checkpoint"),
        ("training", "cut"),
        ("end", "later"),
        pytest.param("training", "later", marks=pytest.mark.slow),
        pytest.param("end", "lost", marks=pytest.mark.slow),
    ],
)
def test_curves_and_log_are_those_of_an_unbroken_run(unbroken, tmp_path, name, log):
    there, whole, rows = unbroken
    content = (there / "metrics.csv").read_bytes() if log == "later" else (there / f"{name}.csv").read_bytes()
    if log != "lost":  # a kill may come when nothing is on the disk yet
        (tmp_path / "metrics.csv").write_bytes(content[: len(content) - 9 if log == "cut" else None])
    record, resumed = run(tmp_path, resume=there / f"{name}.ckpt")
    assert record.curves.keys() == whole.curves.keys()
    for curve, points in whole.curves.items():
        assert [at for at, _ in record.curves[curve]] == [at for at, _ in points]
        assert [value for _, value in record.curves[curve]] == pytest.approx([value for _, value in points], rel=1e-5)
    if log != "lost":
        assert [row[:2] for row in comparable(resumed)] == [row[:2] for row in comparable(rows)]
        values = [row[2] for row in comparable(rows)]
        assert [row[2] for row in comparable(resumed)] == pytest.approx(values, rel=1e-5)


class Interrupt(Callback):
    """Interrupts the second epoch once, at a hook: by a signal, as the outside does, or by an exception."""

    def __init__(self, hook, how, batch):
        def interrupt(trainer, pl_module, *arguments):
            at = arguments[-1] if "_batch_" in hook else None
            too_early = hook == "on_save_checkpoint" and trainer.fit_loop.epoch_progress.current.processed < 2
            if trainer.current_epoch != 1 or at != batch or too_early or trainer.sanity_checking or self.done:
                return
            self.done = True
            if isinstance(how, signal.Signals):
                signal.raise_signal(how)
            else:
                raise how

        self.done = False
        setattr(self, hook, interrupt)


def keep(folder, *callbacks, **options):
    """Train three epochs with everything that a recipe keeps of a run."""
    checkpoints = str(folder / "checkpoints")
    own = [NonFiniteGuard(), EpochReport(), RunRecord(folder), *callbacks]
    own += [BestCheckpoint(checkpoints, "step", "max"), LastCheckpoint(checkpoints)]
    logger = AppendingCSVLogger(str(folder), name="", version="")
    given = {"logger": logger, "max_epochs": 3, "enable_checkpointing": True, "log_every_n_steps": 3}
    trainer(folder, *own, **given).fit(classifier(), data(), **options)


def kept(folder):
    """What a run leaves, without what the clock says."""
    facts = json.loads((folder / "model" / "training_facts.json").read_text())
    for name in ("duration_s", "speed"):
        facts.pop(name)
    rows = comparable(read_rows(folder / "metrics.csv"))
    saved = [torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("last", "best")]
    weights = {(at, name): tensor for at, file in enumerate(saved) for name, tensor in file["state_dict"].items()}
    return facts, rows, weights


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Folders of unbroken runs, without and with averaged weights."""
    folders = {averaged: tmp_path_factory.mktemp("whole") for averaged in (False, True)}
    for averaged, folder in folders.items():
        keep(folder, *([EMA(0.8)] if averaged else []))
    return folders


LAST_VALIDATION_BATCH = 4  # 37 pictures in batches of 8


HOOKS = [
    ("on_validation_start", None),
    ("on_validation_batch_start", 0),
    ("on_validation_batch_end", 2),
    ("on_validation_batch_start", LAST_VALIDATION_BATCH),
    ("on_validation_batch_end", LAST_VALIDATION_BATCH),
    ("on_validation_epoch_end", None),
    ("on_validation_end", None),
    ("on_save_checkpoint", None),  # of the best weights, which change in each epoch
    ("on_train_epoch_end", None),
]
QUICK = [
    (signal.SIGINT, *HOOKS[0], False),
    (RuntimeError("no memory"), *HOOKS[4], True),
    (signal.SIGTERM, *HOOKS[2], True),
    (signal.SIGINT, *HOOKS[7], False),
]
ALL = itertools.product((signal.SIGTERM, signal.SIGINT, RuntimeError("no memory")), HOOKS, (False, True))


@pytest.mark.parametrize(
    ("how", "hook", "batch", "averaged"),
    [*QUICK, *(pytest.param(how, *hook, averaged, marks=pytest.mark.slow) for how, hook, averaged in ALL)],
)
def test_a_validation_that_was_interrupted_leaves_no_trace(whole_runs, tmp_path, how, hook, batch, averaged):
    average = [EMA(0.8)] if averaged else []
    expected = {signal.SIGTERM: SIGTERMException, signal.SIGINT: SystemExit}.get(how, RuntimeError)
    with pytest.raises(expected):
        keep(tmp_path, Interrupt(hook, how, batch), *average)
    keep(tmp_path, *average, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    (facts, rows, weights), (again, rows_again, weights_again) = kept(whole_runs[averaged]), kept(tmp_path)
    assert all(torch.equal(value, weights_again[name]) for name, value in weights.items())
    assert [row[:2] for row in rows_again] == [row[:2] for row in rows]
    assert [row[2] for row in rows_again] == pytest.approx([row[2] for row in rows], rel=1e-5)
    curves, curves_again = facts.pop("curves"), again.pop("curves")
    assert curves_again.keys() == curves.keys()
    for name, points in curves.items():
        assert [at for at, _ in curves_again[name]] == [at for at, _ in points]
        assert [value for _, value in curves_again[name]] == pytest.approx([value for _, value in points], rel=1e-5)
    metrics, metrics_again = facts.pop("metrics"), again.pop("metrics")
    assert [metric.pop("value") for metric in metrics_again] == pytest.approx([m.pop("value") for m in metrics])
    assert (metrics_again, again) == (metrics, facts)


def test_a_checkpoint_without_the_sum_of_its_losses_still_loads(unbroken, tmp_path):
    checkpoint = torch.load(unbroken[0] / "training.ckpt", weights_only=True)
    assert checkpoint.pop("train_loss")[1] == 3 * 8  # images so far
    torch.save(checkpoint, tmp_path / "old.ckpt")
    record, _ = run(tmp_path, resume=tmp_path / "old.ckpt")
    assert len(record.curves["train_loss"]) == 3


@pytest.mark.parametrize(("limit", "images"), [(1.0, None), (2, 16), (1, 8)])
def test_the_number_behind_a_metric_is_what_was_measured(tmp_path, limit, images):
    record, _ = run(tmp_path, limit_val_batches=limit, limit_train_batches=1)
    facts = record.curves["val_images"]
    module = data()
    module.setup("fit")
    assert [count for _, count in facts] == [images or module.split_sizes["validation"]] * 3


def test_a_log_that_was_cut_anywhere_is_read_without_its_broken_end(tmp_path):
    writer = WholeWriter(str(tmp_path))
    for step in range(3):
        writer.log_metrics({"val_loss": step / 7, "epoch": step}, step)
        writer.log_metrics({"train_loss": step / 3, "epoch": step}, step)
    writer.save()
    path = tmp_path / "metrics.csv"
    whole = path.read_bytes()
    rows = read_rows(path)
    assert len(rows) == 6
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        ends = whole[:length].count(b"\r\n") + whole[:length].endswith(b"\r")
        assert read_rows(path) == rows[: max(0, ends - 1)]
    path.write_bytes(whole + b"\0" * 100)
    assert read_rows(path) == rows


def test_new_columns_keep_the_rows_before_them(tmp_path):
    first = WholeWriter(str(tmp_path))
    first.log_metrics({"a": 1.0}, 0)
    first.save()
    second = WholeWriter(str(tmp_path))
    second.log_metrics({"b": 2.0}, 1)
    second.save()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1.0", "b": "", "step": "0"}, {"a": "", "b": "2.0", "step": "1"}]
