"""What a run shows while it trains: the line of an epoch, and the sheet of reconstructions of a pre-training."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENCE, TRAINING_WARNINGS
from exact_run import classifier, data, trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from short import short
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from swin_hf.training import EpochReport, SwinMaskedImageModeler
from swin_hf.training.tasks.masked_image_modeling import Reconstructions, random_masks
from swin_hf.training.tasks.sheets import draw_pictures

pytestmark = TRAINING_WARNINGS
LINE = re.compile(
    r"epoch +(\d+)/(\d+)  train_loss ([\d.]+)  val_loss ([\d.]+)  val_accuracy ([\d.]+)  lr (\S+)  "
    r"([\d,]+) images/s  [\d.]+ s"
)


class Rates(Callback):
    """The learning rate that each epoch ends with."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, *_):
        self.seen.append(trainer.optimizers[0].param_groups[-1]["lr"])


def test_an_epoch_is_a_line_of_what_was_logged(tmp_path, capsys):
    report, rates = EpochReport(), Rates()
    runner = trainer(tmp_path, report, rates, max_epochs=2)
    runner.fit(classifier(), data())
    lines = [LINE.fullmatch(line) for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.group(1, 2) for line in lines] == [("1", "2"), ("2", "2")]
    assert [line[6] for line in lines] == [f"{rate:.2e}" for rate in rates.seen]
    names = ("train_loss", "val_loss", "val_accuracy")
    assert lines[-1].group(3, 4, 5) == tuple(f"{float(runner.callback_metrics[name]):.4f}" for name in names)
    assert lines[-1][7] == f"{float(runner.callback_metrics['train_images_per_s']):,.0f}"
    report.images = 0  # an epoch that was interrupted after its last step
    report.on_train_epoch_end(runner, runner.lightning_module)
    told = capsys.readouterr().out
    assert told.startswith("epoch") and "images/s" not in told


class Measured(Callback):
    """Puts numbers in place of those that the report has measured: 100 images in 10 s."""

    def __init__(self, report, read, waited, workers):
        self.report, self.read, self.waited, self.workers = report, read, waited, workers

    def on_train_epoch_start(self, trainer, *_):
        trainer.train_dataloader.num_workers = 0  # the next epoch needs none

    def on_train_epoch_end(self, trainer, *_):
        loader = trainer.train_dataloader
        assert loader.read_seconds > 0 and loader.waited_seconds > 0
        self.report.images, self.report.ended, self.report.warm = 100, 10.0, (0, 0.0, 0.0, 0.0)
        loader.read_seconds, loader.waited_seconds, loader.num_workers = self.read, self.waited, self.workers


@pytest.mark.parametrize(
    ("read", "waited", "workers", "said"),
    [
        (2.0, 2.5, 0, "loader 50 images/s (0 workers), model 13 images/s: the model waits 25% of the time"),
        (20.0, 5.0, 2, "loader 10 images/s (2 workers), model 20 images/s: the model waits 50% of the time"),
        (10.0, 0.0, 4, "loader 40 images/s (4 workers), model 10 images/s: the loader waits"),
    ],
)
def test_the_first_epoch_says_who_waits_for_whom(tmp_path, capsys, read, waited, workers, said):
    report = EpochReport()
    measured = Measured(report, read, waited, workers)
    trainer(tmp_path, measured, report, max_epochs=2).fit(classifier(), data(limit_train=112))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "loader" in line] == [said]
    assert [line.split()[0] for line in lines if line.startswith(("epoch", "loader"))] == ["epoch", "loader", "epoch"]


def test_an_epoch_of_few_batches_says_nothing_of_waiting(tmp_path, capsys):
    trainer(tmp_path, EpochReport(), max_epochs=1).fit(classifier(), data(limit_train=88))  # 11 batches
    runner = trainer(tmp_path, EpochReport(), max_epochs=1, limit_train_batches=11)
    runner.fit(classifier(), data(limit_train=112))
    printed = capsys.readouterr().out
    assert printed.count("epoch   1/1") == 2 and "loader" not in printed


RANK = """
import sys, warnings
warnings.simplefilter("ignore")
from exact_run import classifier, data, trainer
from test_shown import Measured
from swin_hf.training import EpochReport

if __name__ == "__main__":
    report = EpochReport()
    rank = int(sys.argv[1])
    measured = Measured(report, *((20.0, 5.0, 2), (10.0, 1.0, 2))[rank])
    parallel = {"strategy": "ddp", "devices": 2, "max_epochs": 1}
    trainer(".", measured, report, **parallel).fit(classifier(), data(limit_train=224))
"""


def test_the_rates_of_two_ranks_are_added_and_told_once(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (tests.parent, tests, tests / "training")))
    common = {"WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": paths}
    common |= {"MASTER_PORT": str(22000 + os.getpid() % 20000), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "rank.py", str(rank)],
            env=os.environ | common | {"LOCAL_RANK": str(rank)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-6000:]
    said = "loader 30 images/s (2 workers), model 31 images/s: the model waits 30% of the time"
    assert [[line for line in output.splitlines() if "loader " in line] for output in outputs] == [[said], []]


@pytest.mark.parametrize("channels", [3, 1])
def test_the_sheet_of_reconstructions_has_originals_inputs_and_guesses(tmp_path, channels):
    torch.manual_seed(0)
    module = short(
        SwinMaskedImageModeler,
        preset="swin_digits_patch4_window4_32",
        image_size=16,
        num_channels=channels,
        mask_cell=8,
        overrides={"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]},
    )
    source = data(labelled=False, num_channels=channels, erasing=0.0, mean=[0.2] * channels, std=[0.4] * channels)
    board = TensorBoardLogger(str(tmp_path), name="board", version="")
    runner = trainer(tmp_path, Reconstructions(tmp_path, 3), max_epochs=1, limit_train_batches=2, logger=board)
    runner.fit(module, source)

    raw = next(iter(source.val_dataloader()))["pixel_values"][:3].float() / 255  # 3, C, 16, 16
    mask = random_masks(1, (16, 16), 8, (4, 4), 0.6, torch.device("cpu"), torch.Generator().manual_seed(0))
    hidden = np.kron(mask[0].numpy(), np.ones((4, 4))).astype(bool)  # 16, 16
    with torch.no_grad():
        guesses = module.eval()((raw - 0.2) / 0.4, mask.expand(3, -1, -1)).reconstruction * 0.4 + 0.2
    pictures = []
    for original, guess in zip(raw.numpy(), guesses.clamp(0, 1).numpy(), strict=True):
        sheet = (original, np.where(hidden, 0.2, original), np.where(hidden, guess, original))
        pictures += [np.broadcast_to(picture, (3, 16, 16)).transpose(1, 2, 0) for picture in sheet]
    captions = ["original", "input", "reconstruction"] * 3
    draw_pictures(pictures, captions, columns=3).savefig(tmp_path / "expected.png", dpi=120)

    ours, theirs = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        for name in ("reconstructions", "expected")
    )
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 2  # of 255
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in events.Images("reconstructions")] == [2]
