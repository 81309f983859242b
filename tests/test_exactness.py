"""The same numbers, bit for bit: after an interruption, with workers, on several ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import exact_run
import pytest
import torch
import torch.nn.functional as F
from conftest import PATIENCE, TRAINING_WARNINGS
from exact_run import EPOCHS, classifier, data, fit, launch, middle, trainer
from lightning.pytorch import Callback

pytestmark = [
    *TRAINING_WARNINGS,
    # The length of a streaming loader is a number of steps that it keeps to with any number of workers.
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
]

BATCHES = 8  # of an epoch, on one rank
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def at(hook: str, epoch: int):
    return lambda trainer, where: where == hook and trainer.current_epoch == epoch


CHECKPOINTS = {
    "middle": middle(3),
    "last-batch": middle(BATCHES),
    "validated": at("validation", 0),
    "epoch-end": at("epoch", 0),
    "second-epoch": middle(2, epoch=1),
}
FIRST_BATCH = {
    "middle": (0, 3),
    "last-batch": (1, 0),
    "validated": (1, 0),
    "epoch-end": (1, 0),
    "second-epoch": (1, 2),
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run to the end that leaves a checkpoint at every kind of place."""
    folder = tmp_path_factory.mktemp("unbroken")
    torch.set_num_threads(1)
    trace, weights, _ = fit(folder, CHECKPOINTS)
    return folder, trace, weights


def assert_continued(whole, weights, resumed, again, first):
    assert min(resumed.batches) == first
    assert {key: whole.batches[key] for key in resumed.batches} == resumed.batches
    assert max(resumed.batches) == max(whole.batches)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_resume_is_bit_for_bit(unbroken, name):
    """Silent failures 5, 7, 8: same remaining samples, same draws, same final weights."""
    folder, whole, weights = unbroken
    assert len(whole.batches) == EPOCHS * BATCHES
    resumed, again, _ = fit(folder, resume=name)
    assert_continued(whole, weights, resumed, again, FIRST_BATCH[name])


@pytest.mark.parametrize("name", ["middle", pytest.param("second-epoch", marks=pytest.mark.slow)])
def test_resume_with_workers_is_bit_for_bit_and_equal_to_none(unbroken, name):
    """Two workers: the pictures do not depend on who augments them."""
    folder, whole, weights = unbroken
    resumed, again, _ = fit(folder, resume=name, data_options={"num_workers": 2})
    assert_continued(whole, weights, resumed, again, FIRST_BATCH[name])


@pytest.mark.parametrize("name", ["middle", "epoch"])
@pytest.mark.parametrize("limit", [1.0, 5])
def test_resume_inside_an_accumulation_window_replays_it(tmp_path, limit, name):
    """Gradients are not in a checkpoint: the batches whose gradients were lost are computed again."""
    options = {"accumulate_grad_batches": 3, "limit_train_batches": limit}
    whole, weights, _ = fit(tmp_path, {"middle": middle(4), "epoch": at("epoch", 0)}, **options)
    resumed, again, _ = fit(tmp_path, resume=name, **options)
    assert_continued(whole, weights, resumed, again, (0, 3) if name == "middle" else (1, 0))


class Crash(Callback):
    """An error in the middle of a training step, and the checkpoint that is saved because of it."""

    def __init__(self, folder):
        self.folder = folder

    def on_before_backward(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 4:
            raise KeyError("power cut")

    def on_exception(self, trainer, *_):
        trainer.save_checkpoint(self.folder / "crash.ckpt")


def test_a_batch_that_crashed_is_not_lost(unbroken):
    folder, whole, weights = unbroken
    with pytest.raises(KeyError, match="power cut"):
        trainer(folder, Crash(folder)).fit(classifier(), data())
    resumed, again, _ = fit(folder, resume="crash")
    assert_continued(whole, weights, resumed, again, (0, 3))


def test_resume_on_other_data_or_in_another_order_is_refused(unbroken):
    folder, *_ = unbroken
    for option, name in (
        ({"seed": 4}, "seed"),
        ({"limit_train": 48}, "fingerprint|train_size"),
        ({"split_seed": 1}, "s"),
    ):
        with pytest.raises(ValueError, match=rf"written with data ({name}).*and this run has"):
            fit(folder, resume="middle", data_options=option)


def test_another_batch_size_is_refused_inside_an_epoch_and_accepted_between_two(unbroken):
    folder, *_ = unbroken
    with pytest.raises(ValueError, match="data global_batch 8, and this run has 16"):
        fit(folder, resume="middle", data_options={"batch_size": 16})
    with pytest.raises(ValueError, match="trained with 8 images a step, and this run has 16"):  # they scale the rate
        fit(folder, resume="epoch-end", data_options={"batch_size": 16})
    resumed, *_ = fit(folder, resume="epoch-end", data_options={"batch_size": 4}, accumulate_grad_batches=2)
    assert sorted(resumed.batches) == [(1, index) for index in range(16)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The digits' test split as four training shards, and a validation file."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("shards")
    digits = Dataset.from_parquet(str(exact_run.DIGITS / "test.parquet"))
    for index in range(4):
        digits.shard(4, index).to_parquet(folder / f"train-{index}.parquet")
    digits.select(range(51)).to_parquet(folder / "validation.parquet")
    return {
        "streaming": True,
        "limit_train": None,
        "data_files": {"train": f"{folder}/train-*.parquet", "validation": f"{folder}/validation.parquet"},
    }


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streams_change_their_order_each_epoch_and_resume_exactly(tmp_path, shards, workers, monkeypatch):
    """Silent failures 11 and 13."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    options = {"data_options": shards | {"num_workers": workers}, "limit_train_batches": 6, "max_epochs": 2}
    whole, weights, _ = fit(tmp_path, {"middle": middle(4), "late": middle(2, epoch=1)}, **options)
    labels = [[whole.batches[epoch, index][1] for index in range(6)] for epoch in range(2)]
    assert labels[0] != labels[1]
    for name, first in (("middle", (0, 4)), ("late", (1, 2))):
        resumed, again, _ = fit(tmp_path, resume=name, **options)
        assert_continued(whole, weights, resumed, again, first)


def test_a_stream_without_steps_is_refused_before_the_first_step(tmp_path, shards):
    with pytest.raises(ValueError, match="limit_train_batches N"):
        trainer(tmp_path).fit(classifier(), data(**shards))


def test_validation_batches_are_seen_once_and_metrics_are_those_of_plain_torch(tmp_path):
    expected_loss, expected_accuracy = plain_metrics()
    metrics = trainer(tmp_path, precision="64-true").validate(classifier(), data(), verbose=False)[0]
    assert metrics["val_loss"] == pytest.approx(expected_loss, rel=1e-6)  # the loss is summed in fp32
    assert metrics["val_accuracy"] == pytest.approx(expected_accuracy, abs=1e-7)


def plain_metrics() -> tuple[float, float]:
    """Loss and accuracy by a loop over single pictures in double precision."""
    module, source = classifier().eval().double(), data()
    source.load()
    losses, hits = [], []
    with torch.no_grad():
        for batch in source.val_dataloader():
            pixels = source.on_after_batch_transfer(dict(batch), 0)["pixel_values"].double()
            for picture, label in zip(pixels, batch["labels"], strict=True):
                logits = module(picture[None])
                losses.append(F.cross_entropy(logits, label[None]).item())
                hits.append(logits.argmax().item() == label.item())
    assert len(losses) == 37  # odd: two ranks cannot share it evenly
    return sum(losses) / len(losses), sum(hits) / len(hits)


def check_ranks(folder, ranks, **options):
    """Everything that must hold for a distributed run; returns what rank 0 left."""
    results = launch(folder, ranks, **options)
    for result in results:
        assert len(result["whole"]) == EPOCHS * BATCHES // ranks
        for name in options.get("resume", ["middle"]):
            assert {key: result["whole"][key] for key in result[name]} == result[name]
            for weight, value in result["weights"].items():
                assert torch.equal(value, result[f"{name}_weights"][weight])
                assert torch.equal(value, results[0]["weights"][weight])
    draws = [draw for result in results for draw in result["draws"]]
    assert len(set(draws)) == len(draws)  # silent failure 16: every rank draws for itself
    metrics = [result["metrics"] for result in results]
    assert metrics[0] == metrics[1]
    return results[0]


def test_two_ranks_are_exact(tmp_path):
    """Silent failures 2, 3, 6, 16: metrics of an odd number of pictures, resume, draws of each rank."""
    result = check_ranks(tmp_path, 2, resume=["middle", "late"])
    single = trainer(tmp_path, precision="64-true").validate(classifier(), data(), verbose=False)[0]
    assert result["metrics"].keys() == single.keys()
    for name, value in single.items():
        # One rounding of float32 may differ: the losses are summed in another order.
        assert result["metrics"][name] == pytest.approx(value, rel=1e-6)
    loss, accuracy = plain_metrics()
    assert result["metrics"]["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert result["metrics"]["val_accuracy"] == pytest.approx(accuracy, abs=1e-7)


@pytest.mark.slow
def test_two_ranks_with_workers_are_exact(tmp_path):
    check_ranks(tmp_path, 2, resume=["middle", "late"], data={"num_workers": 2})


@pytest.mark.slow
def test_two_ranks_of_a_stream_neither_hang_nor_lose_a_batch(tmp_path, shards):
    """Silent failure 12: 63 and 51 rows do not divide; the run ends all the same, and resumes exactly."""
    results = launch(tmp_path, 2, data=shards, trainer={"limit_train_batches": 7})
    for result in results:
        assert len(result["whole"]) == 2 * 7
        assert {key: result["whole"][key] for key in result["middle"]} == result["middle"]
        assert all(torch.equal(value, result["middle_weights"][name]) for name, value in result["weights"].items())
    single = trainer(tmp_path, precision="64-true").validate(classifier(), data(**shards), verbose=False)[0]
    assert results[0]["metrics"]["val_loss"] == pytest.approx(single["val_loss"], rel=1e-6)


def recipe(folder: Path, *options: str, **environment: str) -> subprocess.Popen:
    """``recipes/finetune.py fit`` on the digits, with a very small model."""
    return subprocess.Popen(
        [
            sys.executable, str(ROOT / "recipes" / "finetune.py"), "fit", "--runs", str(folder), "--name", "t",
            "--model.network.overrides", '{"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}',
            "--model.optimization.warmup_epochs", "0.5", *options,
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_sigterm_saves_and_exits_143_and_the_same_command_goes_on(tmp_path):
    """Silent failures 14 and 15."""
    command = ("--ckpt_path", "last", "--trainer.max_epochs", "400")
    process = recipe(tmp_path, *command)
    metrics = tmp_path / "t" / "metrics.csv"
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 143, output
    saved = torch.load(tmp_path / "t" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] > 0
    epochs = str(saved["epoch"] + 1)
    again = recipe(tmp_path, "--ckpt_path", "last", "--trainer.max_epochs", epochs)
    output = again.communicate(timeout=PATIENCE)[0]
    assert again.returncode == 0, output
    after = torch.load(tmp_path / "t" / "checkpoints" / "last.ckpt", weights_only=True)
    assert after["global_step"] == int(epochs) * 40


@pytest.mark.slow
def test_torchrun_with_too_few_devices_is_refused(tmp_path):
    """Silent failure 4, as it happens."""
    process = recipe(tmp_path, "--trainer.devices", "1", WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode != 0
    assert "the launcher started 2 processes, but this trainer counts 1" in output
    assert not (tmp_path / "t" / "checkpoints").exists()
