"""What surrounds a run: averages, guards, checkpoints, facts."""

import json
import resource
import signal
import tempfile

import numpy as np
import pytest
import torch
from conftest import TRAINING_WARNINGS
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassF1Score
from transformers import SwinConfig, SwinForImageClassification

from swin_hf.files import redact
from swin_hf.hub.pictures import draw_confusion, draw_curves
from swin_hf.training import EMA, LastCheckpoint, NonFiniteGuard
from swin_hf.training.callbacks import to_pixels
from swin_hf.training.checkpointing import BestCheckpoint, NonFiniteLossError
from swin_hf.training.facts import command_line
from swin_hf.training.tasks.classification import class_scores, macro_f1, score_table
from swin_hf.training.tasks.sheets import draw_pictures

pytestmark = [
    *TRAINING_WARNINGS,
    # Resuming in place is what is tested.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Line(LightningModule):
    """One weight and one integer buffer, trained to grow by exactly 1 a step; the loss can be poisoned."""

    def __init__(self, bad_step=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.register_buffer("index", torch.arange(169))
        self.bad_step = bad_step

    def training_step(self, batch, batch_idx):
        loss = -self.weight.sum()
        return loss * torch.nan if self.global_step == self.bad_step else loss

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", self.weight.mean(), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self):
        return DataLoader(torch.zeros(4, 1))

    def val_dataloader(self):
        return DataLoader(torch.zeros(1, 1))


def trainer(folder, *callbacks, **options):
    options = {
        "max_epochs": 2,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
    } | options
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_ema_never_touches_the_index_buffers_of_a_swin(tmp_path, decay):
    # Silent failure 1: Lightning's default averages int64 buffers; 0.9999 moves 41 of 256 entries by one.
    class Theirs(Line):
        def __init__(self):
            super().__init__()
            config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[1], window_size=4)
            self.model = SwinForImageClassification(config)

    module = Theirs()
    before = {name: value.clone() for name, value in module.named_buffers()}
    assert "index" in before and any(value.dtype == torch.int64 and value.numel() > 1 for value in before.values())
    trainer(tmp_path, EMA(decay)).fit(module)
    for name, value in module.named_buffers():
        assert torch.equal(value, before[name]), name


def test_lightnings_own_default_fails_that_test(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = Line()
    trainer(tmp_path, EMAWeightAveraging(decay=0.9999)).fit(module)
    assert not torch.equal(module.index, torch.arange(169))


def test_ema_is_the_recursion_it_claims_to_be_and_is_what_is_validated_and_saved(tmp_path):
    module = Line()
    best = BestCheckpoint(str(tmp_path))
    runner = trainer(tmp_path, EMA(0.8, warmup=True), best)
    runner.fit(module)
    average = weight = 1.0  # the first update copies
    for step in range(1, 8):
        weight += 1.0
        average += (1 - min(0.8, (1 + step) / (10 + step))) * (weight - average)
    torch.testing.assert_close(module.weight.detach(), torch.full((3,), average))
    assert runner.callback_metrics["val_accuracy"].item() == pytest.approx(average)
    saved = torch.load(best.best_model_path, weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["weight"], torch.full((3,), average))
    torch.testing.assert_close(saved["current_model_state"]["weight"], torch.full((3,), weight))


def test_ema_without_warmup_and_every_second_step(tmp_path):
    module = Line()
    trainer(tmp_path, EMA(0.5, warmup=False, every_n_steps=2)).fit(module)
    average = 2.0
    for weight in (4.0, 6.0, 8.0):
        average += 0.5 * (weight - average)
    torch.testing.assert_close(module.weight.detach(), torch.full((3,), average))


def test_ema_survives_a_resume(tmp_path):
    whole = Line()
    trainer(tmp_path, EMA(0.9)).fit(whole)
    trainer(tmp_path, EMA(0.9), LastCheckpoint(str(tmp_path)), max_epochs=1).fit(Line())
    resumed = Line()
    trainer(tmp_path, EMA(0.9), LastCheckpoint(str(tmp_path))).fit(resumed, ckpt_path="last")
    assert torch.equal(resumed.weight, whole.weight)


def test_what_is_tested_after_the_training_is_the_average_of_the_best(tmp_path):
    class Tested(Line):
        def test_step(self, batch, batch_idx):
            self.log("test_weight", self.weight.mean(), batch_size=1)

        def test_dataloader(self):
            return DataLoader(torch.zeros(1, 1))

    best = BestCheckpoint(str(tmp_path))
    module = Tested()
    runner = trainer(tmp_path, EMA(0.9), best)
    runner.fit(module)
    average = torch.load(best.best_model_path, weights_only=True)["state_dict"]["weight"]
    tested = runner.test(module, ckpt_path=best.best_model_path, weights_only=True, verbose=False)[0]["test_weight"]
    assert tested == average.mean().item() != module.weight.mean().item() + 1
    assert torch.equal(module.weight, average)


class Validated(Line):
    """Validates in three batches; asks itself to end in a chosen one."""

    def __init__(self, end_at=None, last_batch=False):
        super().__init__()
        self.end_at, self.last_batch, self.validated = end_at, last_batch, []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.last_batch and self.current_epoch == self.end_at and batch_idx == 3:
            signal.raise_signal(signal.SIGTERM)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.validated.append((self.current_epoch, batch_idx))
        if not self.last_batch and self.current_epoch == self.end_at and batch_idx == 1:
            signal.raise_signal(signal.SIGTERM)

    def val_dataloader(self):
        return DataLoader(torch.zeros(3, 1))


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("last_batch", [False, True], ids=["in validation", "on the last training batch"])
@pytest.mark.parametrize("average", [False, True], ids=["plain", "ema"])
def test_a_validation_that_was_interrupted_is_done_again(tmp_path, epoch, last_batch, average):
    # Lightning leaves the swap of an average half done, and takes an interrupted validation for complete.
    def run(folder, module, **options):
        best = BestCheckpoint(str(folder))
        callbacks = [*([EMA(0.9)] if average else []), best, LastCheckpoint(str(folder))]
        trainer(folder, *callbacks).fit(module, **options)
        return best, torch.load(folder / "last.ckpt", weights_only=True)

    whole, state = run(tmp_path / "whole", Validated())
    with pytest.raises(SIGTERMException):
        run(tmp_path, Validated(epoch, last_batch))
    resumed = Validated()
    best, again = run(tmp_path, resumed, ckpt_path="last")
    assert resumed.validated == [(e, batch) for e in range(epoch, 2) for batch in range(3)]
    assert best.best_model_score == whole.best_model_score
    for key in ("state_dict", *(["current_model_state"] if average else [])):
        assert torch.equal(again[key]["weight"], state[key]["weight"]), key
    assert again["global_step"] == state["global_step"] == 8


def test_ema_of_16_bit_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"bf16-true\) never moves.*use trainer\.precision bf16-mixed"):
        trainer(tmp_path, EMA(), precision="bf16-true").fit(Line())


@pytest.mark.parametrize(
    ("options", "message"), [({"decay": 1.0}, "decay is 1.0"), ({"every_n_steps": 0}, "every_n_steps is 0")]
)
def test_ema_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(**options)


@pytest.mark.parametrize("bad_step", [0, 2, 6])
def test_nan_stops_with_its_step_and_keeps_the_last_good_checkpoint(tmp_path, bad_step):
    runner = trainer(tmp_path, NonFiniteGuard(), LastCheckpoint(str(tmp_path)), max_epochs=3)
    with pytest.raises(NonFiniteLossError, match=f"the loss is not finite at step {bad_step + 1}"):
        runner.fit(Line(bad_step))
    if bad_step < 4:
        assert not (tmp_path / "last.ckpt").exists()
    else:
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert state["global_step"] == 4 and state["state_dict"]["weight"].isfinite().all()


def test_weights_that_the_last_step_spoilt_are_not_saved(tmp_path):
    class Spoilt(Line):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 7:  # the last of the second epoch; its loss was finite
                self.weight.grad.fill_(torch.inf)

    runner = trainer(tmp_path, NonFiniteGuard(), BestCheckpoint(str(tmp_path)), LastCheckpoint(str(tmp_path)))
    with pytest.raises(
        NonFiniteLossError, match=r"the weights are not finite after step 8; the last good state is .*last"
    ):
        runner.fit(Spoilt())
    for name in ("last.ckpt", "best.ckpt"):
        state = torch.load(tmp_path / name, weights_only=True)
        assert state["global_step"] == 4 and state["state_dict"]["weight"].isfinite().all()


def test_checkpoints_are_written_beside_their_place(tmp_path, monkeypatch):
    # From the folder of temporary files they would be copied over the previous one, which a full disk leaves half done.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    trainer(tmp_path, BestCheckpoint(str(tmp_path)), LastCheckpoint(str(tmp_path))).fit(Line())
    assert {path.name for path in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}


def test_every_epoch_is_kept_also_without_a_validation(tmp_path):
    runner = trainer(tmp_path, LastCheckpoint(str(tmp_path)), max_epochs=3, check_val_every_n_epoch=2)
    runner.fit(Line())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 12


@pytest.mark.parametrize("moved", [False, True], ids=["another run", "a moved run"])
def test_the_best_so_far_is_remembered_in_another_folder(tmp_path, moved):
    first, second = tmp_path / "first", tmp_path / "second"
    trainer(first, BestCheckpoint(str(first), mode="min"), LastCheckpoint(str(first))).fit(Line())
    if moved:
        first.rename(second)
    best = BestCheckpoint(str(second), mode="min")  # the weight grows: the first epoch stays the best
    source = (second if moved else first) / "last.ckpt"
    trainer(second, best, LastCheckpoint(str(second)), max_epochs=3).fit(Line(), ckpt_path=source)
    assert best.best_model_path == str(second / "best.ckpt") and best.best_model_score == 4
    assert torch.load(second / "best.ckpt", weights_only=True)["global_step"] == 4


def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    runner = trainer(tmp_path, LastCheckpoint(str(tmp_path)), max_epochs=1)
    runner.fit(Line())
    before = (tmp_path / "last.ckpt").read_bytes()
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a file that grows too far is an OSError
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"(?i)large|space"):
            trainer(tmp_path, LastCheckpoint(str(tmp_path)), max_epochs=1).fit(Line())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_interruption_in_mid_epoch_is_saved(tmp_path):
    # Silent failure 15: without save_on_exception, SIGTERM loses everything since the last epoch.
    class Interrupted(Line):
        def training_step(self, batch, batch_idx):
            if self.global_step == 6:
                signal.raise_signal(signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    with pytest.raises(SIGTERMException):
        trainer(tmp_path, LastCheckpoint(str(tmp_path)), max_epochs=4).fit(Interrupted())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7


def test_class_scores_equal_scikit_learn():
    random = np.random.default_rng(0)
    truth, guess = random.integers(0, 4, 200), random.integers(0, 3, 200)  # class 3 is never guessed
    scores = class_scores(confusion_matrix(truth, guess, labels=range(5)), list("abcde"))  # class 4 never appears
    expected = precision_recall_fscore_support(truth, guess, labels=range(5), zero_division=np.nan)
    ours = np.array([[s.precision, s.recall, s.f1, s.support] for s in scores], dtype=float).T  # None becomes NaN
    np.testing.assert_allclose(ours, np.array(expected), atol=1e-12)
    table = score_table(scores)
    assert len(table.splitlines()) == 6


@pytest.mark.parametrize(
    ("truth", "guess"),
    [
        ([0, 0, 1], [0, 0, 1]),  # no picture of class 2, no mistake: 1, not 2/3
        ([0, 0, 1], [0, 2, 1]),  # class 2 has no picture but is predicted: it counts, with 0
        ([3, 1, 1, 0], [1, 1, 0, 3]),  # class 2 is absent between others
    ],
)
def test_macro_f1_is_over_the_classes_that_occur(truth, guess):
    counts = confusion_matrix(truth, guess, labels=range(4))
    assert macro_f1(counts) == pytest.approx(f1_score(truth, guess, average="macro", zero_division=0))
    theirs = MulticlassF1Score(4, average="macro")(torch.tensor(guess), torch.tensor(truth))
    assert macro_f1(counts) == pytest.approx(float(theirs))
    absent = class_scores(counts, list("abcd"))[2]
    assert (absent.recall, absent.f1, absent.support) == (None, None, 0)
    (line,) = [line for line in score_table(class_scores(counts, list("abcd"))).splitlines() if line.startswith("c ")]
    assert line.split()[-3:] == ["-", "-", "0"]


def test_facts_hold_no_absolute_path_and_no_secret(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [f"{tmp_path}/recipes/finetune.py", "fit", "--data.data_dir", "/home/ann/photos", "--hub.token", "hf_abc"]
    words += ["--api_key=xyz", "--config=/etc/a.yaml", "--model.optimization.learning_rate", "1e-3"]
    line = command_line(words)
    expected = "python recipes/finetune.py fit --data.data_dir photos --hub.token '***' '--api_key=***' --config=a.yaml"
    assert line == f"{expected} --model.optimization.learning_rate 1e-3"
    assert command_line(["/somewhere/else/finetune.py"]) == "python finetune.py"
    words[0:1] = ["/usr/bin/swin-hf", "train"]
    assert command_line(words).startswith("swin-hf train fit --data.data_dir photos --hub.token")
    value = redact({"a": ["/x/y/z", tmp_path, "~/w", "plain/name"], "n": 1, "o": torch.float16})
    assert value == {"a": ["z", tmp_path.name, "w", "plain/name"], "n": 1, "o": "torch.float16"}
    json.dumps(value)


def test_figures_show_every_curve_count_and_picture():
    rates = [[1, 1e-4], [2, 1e-3], [3, 1e-4]]
    curves = {"train_loss": [[1, 2.0], [3, 1.0]], "val_loss": [[3, 1.5]], "val_accuracy": [[3, 0.5]]}
    figure = draw_curves(curves | {"learning_rate": rates}, best_step=3)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "metrics", "learning rate"]
    loss, metrics, _ = figure.axes
    assert loss.lines[0].get_ydata().tolist() == [2.0, 1.0]
    train, val, warmup, best = loss.lines
    assert train.get_color() != val.get_color() == metrics.lines[0].get_color()  # a split has one colour everywhere
    assert (warmup.get_xdata()[0], warmup.get_label()) == (2, "warm-up ends")
    assert (best.get_xdata()[0], best.get_label()) == (3, "best: step 3")
    figure.canvas.draw()
    assert loss.get_legend().get_window_extent().y1 < loss.get_window_extent().y0  # below the curves
    assert [line.get_label() for line in draw_curves(curves).axes[0].lines] == ["train_loss", "val_loss"]
    counts = np.array([[5, 1], [0, 7]])
    figure = draw_confusion(counts, ["cat", "dog"])
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["1", "5", "7"]
    assert figure.axes[1].get_ylabel() == "share of the row"
    assert not draw_confusion(np.eye(40, dtype=int), [str(i) for i in range(40)]).axes[0].texts
    sheet = draw_pictures([np.zeros((4, 4, 3))] * 5, ["x"] * 5, files=[f"{n}.png" for n in range(5)])
    assert [axes.get_xlabel() for axes in sheet.axes] == [f"{n}.png" for n in range(5)]
    pixels = to_pixels(sheet, dpi=20)
    assert pixels.dtype == np.uint8 and pixels.shape[-1] == 3 and pixels.std() > 0
