"""The product: `python recipes/finetune.py fit` and what a run leaves, resumes, refuses and says."""

import contextlib
import csv
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import PATIENCE, TRAINING_WARNINGS
from hub_server import READER, WRITER
from huggingface_hub import HfApi
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor, AutoModelForImageClassification, SwinConfig, SwinForImageClassification

import swin_hf.hub
from swin_hf import SwinHFConfig, SwinHFForImageClassification
from swin_hf.training import SwinClassifier, run_recipe
from swin_hf.training.network import resolve
from swin_hf.training.run_folder import new_run_folder

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "swin_hf" / "training" / "configs" / "digits"

pytestmark = TRAINING_WARNINGS

CONFIG = {
    "name": "tiny",
    "model": {
        "preset": "swin_digits_patch4_window4_32",
        "network": {
            "drop_path_rate": 0.0,
            "overrides": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "initializer_range": 0.1},
        },
        "optimization": {"learning_rate": 5e-3, "lr_scaling": False, "warmup_epochs": 0.5},
    },
    "data": {
        "dataset": "parquet",
        "data_files": {"train": str(DIGITS / "train.parquet"), "test": str(DIGITS / "test.parquet")},
        "image_size": 16,
        "batch_size": 16,
        "splits": {"limit_train": 160},
        "augmentation": {"crop_padding": 1, "hflip": 0.0},
        "pixels": {"resize_mode": "squash"},
    },
    "trainer": {"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 5},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A folder of runs with one complete run in it."""
    runs = tmp_path_factory.mktemp("runs")
    assert fit(config, runs) == 0
    return runs


def fit(config, runs, *words, verb="fit"):
    return run_recipe(SwinClassifier, config, [verb, "--runs", str(runs), *words])


def test_a_run_leaves_everything_that_it_promises(finished):
    run = finished / "tiny"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "checkpoints", "metrics.csv", "tensorboard", "model", "split.json"} <= names
    assert {"curves.png", "confusion_matrix.png", "worst_pictures.png", "sample_pictures.png"} <= names
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {path.name for path in (run / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training_facts.json",
    }
    assert not [path for path in run.rglob(".*")]  # nothing half-written
    for name in ("curves", "confusion_matrix", "worst_pictures", "sample_pictures"):
        with Image.open(run / f"{name}.png") as picture:
            assert picture.width > 100
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train_loss", "val_loss", "val_accuracy", "val_accuracy_top5", "train_images_per_s"} <= set(rows[0])
    steps = [(int(row["step"]), float(row["learning_rate"])) for row in rows if row["train_loss_step"]]
    assert [step for step, _ in steps] == [4, 9, 14, 19] and all(rate > 0 for _, rate in steps)
    events = b"".join(path.read_bytes() for path in (run / "tensorboard").glob("events*"))
    assert all(name in events for name in (b"curves", b"confusion_matrix", b"worst_pictures", b"val_accuracy"))
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("learning_rate", "train_loss_step"):
        written = {int(row["step"]): float(row[name]) for row in rows if row[name]}
        shown = {event.step: event.value for event in board.Scalars(name)}
        assert shown == pytest.approx(written) and list(shown) == [4, 9, 14, 19]
    assert {"curves", "confusion_matrix", "worst_pictures"} <= set(board.Tags()["images"])


def test_one_epoch_of_a_recipe_with_a_longer_warm_up_runs_and_prints_its_line(config, tmp_path, capsys):
    words = ["--trainer.max_epochs", "1", "--model.optimization.warmup_epochs", "3", "--data.splits.limit_train", "32"]
    assert fit(config, tmp_path, *words, "--trainer.enable_checkpointing", "false", "--trainer.logger", "false") == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("epoch ")]
    assert re.fullmatch(
        r"epoch   1/1  train_loss [\d.]+  val_loss [\d.]+  val_accuracy [\d.]+  lr \S+  .* images/s  .* s", line
    )
    assert "\r" not in printed and "it/s" not in printed  # no bar where nobody looks


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--trainer.enable_progress_bar", "false")], ids=["bar", "no bar"])
def test_a_terminal_shows_a_bar_and_keeps_a_line_for_each_epoch(words, config, tmp_path):
    """Through a pseudo-terminal, as a person sees it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(
        theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0)
    )  # rows and columns; 0 of them show no bar
    command = [sys.executable, str(ROOT / "recipes" / "finetune.py"), "fit", "--config", str(config)]
    command += ["--runs", str(tmp_path), "--data.splits.limit_train", "64", *words]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "200"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait(PATIENCE) == 0, shown.decode()
    text = shown.decode()
    assert len(re.findall(r"epoch   [12]/2  train_loss [\d.]+  val_loss [\d.]+  val_accuracy [\d.]+  lr ", text)) == 2
    bars = [part for part in re.split(r"[\r\n]", text) if "it/s" in part]
    assert bool(bars) == (not words)
    if bars:
        assert any(all(name in bar for name in ("train_loss=", "val_accuracy=", "left=0:00")) for bar in bars)


def test_the_model_folder_is_the_best_checkpoint_and_loads_with_auto_classes(finished):
    folder = finished / "tiny" / "model"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {i: str(i) for i in range(10)}
    best = torch.load(finished / "tiny" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, best[f"model.{name}"]), name
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 16)
    assert model(pixel_values=pixels).logits.shape == (1, 10)


def test_the_facts_are_complete_and_true(finished):
    facts = swin_hf.hub.facts.TrainingFacts.load(finished / "tiny" / "model")
    assert facts.data.name == "digits" and facts.data.splits["train"].n == 160
    assert facts.hyper_parameters["learning_rate"] == 5e-3 and facts.hyper_parameters["batch_size"] == 16
    assert facts.seed == 0 and facts.base_model is None and facts.duration_s > 0
    assert {"torch", "transformers", "lightning", "swin_hf", "python"} <= set(facts.versions)
    assert len(facts.curves["val_accuracy"]) == 2 and facts.best_step in {p[0] for p in facts.curves["val_accuracy"]}
    scores = {(m.name, m.split): m for m in facts.metrics}
    test = scores["accuracy", "test"]
    counts = torch.tensor(facts.confusion_matrix.counts)
    assert test.n == 360 == counts.sum() and test.value == pytest.approx(float(counts.diag().sum()) / 360, abs=1e-6)
    assert {s.label for s in facts.per_class} == {str(i) for i in range(10)}
    text = (finished / "tiny" / "model" / "training_facts.json").read_text()
    assert str(ROOT) not in text and str(finished) not in text
    json.loads(text)


def test_a_second_run_gets_its_own_folder_and_last_goes_on_in_it(config, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in (finished / "tiny").rglob("*")}
    assert fit(config, finished, "--trainer.max_epochs", "1") == 0
    assert {path: path.stat().st_mtime_ns for path in (finished / "tiny").rglob("*")} == before
    second = finished / "tiny-v2"
    lines = (second / "metrics.csv").read_text().splitlines()
    assert fit(config, finished, "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert not (finished / "tiny-v3").exists()
    longer = (second / "metrics.csv").read_text().splitlines()
    assert len(longer) > len(lines) and longer[1] == lines[1]  # the log goes on
    facts = swin_hf.hub.facts.TrainingFacts.load(second / "model")
    assert len(facts.curves["train_loss"]) == 2  # and so do the curves
    assert "epoch   2/2" in capsys.readouterr().out


def test_last_is_also_the_first_start(config, tmp_path):
    assert (
        fit(config, tmp_path, "--ckpt_path", "last", "--trainer.max_epochs", "1", "--data.splits.limit_train", "48")
        == 0
    )
    assert (tmp_path / "tiny" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("checkpoint", ["file", "last"])
def test_options_that_contradict_the_checkpoint_are_refused_not_ignored(config, finished, checkpoint):
    # Silent failure 9: LightningCLI lets the checkpoint's options win over the command line, without a word.
    path = "last" if checkpoint == "last" else str(finished / "tiny" / "checkpoints" / "last.ckpt")
    with pytest.raises(SystemExit, match=r"--model\.optimization\.learning_rate: 0\.005 in the checkpoint, 0\.5 now"):
        fit(config, finished, "--config", str(config), "--ckpt_path", path, "--model.optimization.learning_rate", "0.5")


def test_a_checkpoint_brings_the_configuration_of_its_run(finished, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = finished / "tiny" / "checkpoints" / "best.ckpt"
    no_default = finished / "there-is-no-such.yaml"
    assert run_recipe(SwinClassifier, no_default, ["test", "--ckpt_path", str(path), "--runs", str(finished)]) == 0
    facts = swin_hf.hub.facts.TrainingFacts.load(finished / "tiny" / "model")
    accuracy = next(m.value for m in facts.metrics if (m.name, m.split) == ("accuracy", "test"))
    assert f"test_accuracy {accuracy:.4f}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_last_is_what_is_tested_and_nothing_else(config, finished, tmp_path, capsys):
    words = ["--config", str(config), "--ckpt_path"]
    shutil.copytree(finished / "tiny", tmp_path / "runs" / "tiny")
    assert fit(config, finished, *words, str(finished / "tiny/checkpoints/last.ckpt"), verb="test") == 0
    expected = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test_loss")]
    assert fit(config, tmp_path / "runs", *words, "last", verb="test") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("test_loss")] == expected != []
    with pytest.raises(SystemExit, match=r"there is no checkpoint .*last\.ckpt"):
        fit(config, tmp_path, *words, "last", verb="test")


@pytest.mark.parametrize("kind", ["text", "weights", "half"])
def test_a_file_that_is_no_checkpoint_is_an_error_of_one_line(config, finished, tmp_path, kind):
    path, run = tmp_path / "some.ckpt", finished / "tiny"
    if kind == "text":
        path.write_text("# A title\n")
    elif kind == "weights":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        whole = (run / "checkpoints" / "last.ckpt").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match=r"some\.ckpt is not a whole checkpoint of a training run"):
        fit(config, tmp_path, "--config", str(config), "--ckpt_path", str(path))


def test_a_missing_checkpoint_is_an_error(config, tmp_path):
    with pytest.raises(SystemExit, match=r"there is no checkpoint nowhere\.ckpt"):
        fit(config, tmp_path, "--config", str(config), "--ckpt_path", "nowhere.ckpt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.data_files.test", "missing.parquet"], r"missing\.parquet"),
        (["--model.preset", "swin_huge"], "unknown preset 'swin_huge'"),
        (["--data.batch_size", "1000000", "--data.image_size", "4096"], "GiB of memory are free"),
        *(
            pytest.param(
                [f"--trainer.logger+={name}"],
                f"{name}: .*{package}",
                marks=pytest.mark.skipif(find_spec(package) is not None, reason=f"{package} is there"),
            )
            for name, package in {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet"}.items()
        ),
    ],
)
def test_bad_input_is_an_error_of_one_line(config, tmp_path, words, message):
    with pytest.raises(SystemExit, match=message) as stop:
        fit(config, tmp_path, *words)
    assert "\n" not in str(stop.value.code) and not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is there")
def test_a_logger_of_ours_without_its_package_is_an_error_of_one_line(config, tmp_path, capsys):
    assert fit(config, tmp_path, "--trainer.logger+=swin_hf.training.TrackioLogger") == 1
    assert "error: this logger needs trackio: pip install trackio" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.max_epochs", "-1"], "the end of the training is unknown; set trainer.max_epochs"),
        (["--name", "a/b"], "the name of a run is 'a/b'"),
        (["--trainer.limit_test_batches", "0.001"], "You requested to check 0.001 of the `test_dataloader`"),
        (["--trainer.val_check_interval", "1000"], "`val_check_interval` (1000) must be less than or equal to"),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val_acc"],
            "Early stopping conditioned on metric `val_acc`",
        ),
    ],
)
def test_what_is_found_out_later_is_an_error_of_one_line_too(config, tmp_path, capsys, words, message):
    assert fit(config, tmp_path, "--data.splits.limit_train", "48", *words) == 1
    errors = capsys.readouterr().err
    assert f"error: {message}" in errors and "Traceback" not in errors


@pytest.mark.filterwarnings("ignore:(?s).*Unable to serialize instance cpu")  # the device of the first callback
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("callbacks=StochasticWeightAveraging callbacks.swa_lrs=1e-3", "use swin_hf.training.EMA"),
        ("callbacks=LearningRateFinder", "set --model.optimization.learning_rate"),
        ("callbacks=BatchSizeFinder", "set --data.batch_size"),
        ("strategy=ddp_spawn devices=2", "use --trainer.strategy ddp, outside of a notebook"),
    ],
)
def test_what_would_undo_the_plan_of_a_run_is_refused(config, tmp_path, words, said):
    # The run of ddp_spawn was removed as if nothing had been trained, and the average of the first is not in model/.
    with pytest.raises(SystemExit, match=f"does not fit a run: .*{said}"):
        fit(config, tmp_path, *(f"--trainer.{word}" for word in words.split()))
    assert not list(tmp_path.iterdir())


def test_one_batch_is_not_all_of_them():
    # What typing makes of Optional[Union[int, float]] depends on what other libraries asked for before.
    script = (
        "from lightning.pytorch import Trainer; from swin_hf.training import SwinClassifier, run_recipe\n"
        "Trainer.__init__.__annotations__['limit_train_batches'] = float | int | None\n"
        "words = ['--trainer.limit_train_batches', '1', '--trainer.limit_val_batches', '1.0', '--print_config']\n"
        "run_recipe(SwinClassifier, 'digits', ['fit', *words])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=PATIENCE)
    trainer = yaml.safe_load(done.stdout)["trainer"]
    assert repr((trainer["limit_train_batches"], trainer["limit_val_batches"])) == "(1, 1.0)"


def test_a_validation_without_a_split_is_an_error(config, finished, capsys):
    words = ["--config", str(config), "--ckpt_path", str(finished / "tiny" / "checkpoints" / "best.ckpt")]
    files = f"{{test: {DIGITS / 'test.parquet'}}}"
    assert fit(config, finished, *words, "--data.data_files", files, verb="validate") == 1
    assert "has no validation split with labels (found ['test'])" in capsys.readouterr().err


def test_a_run_without_a_step_says_why(config, tmp_path, capsys):
    assert fit(config, tmp_path, "--trainer.limit_train_batches", "0") == 0
    assert "nothing was trained: max_time or limit_train_batches leaves no step to take" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_library_keeps_its_traceback(config, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("from elsewhere")

    monkeypatch.setattr(SwinClassifier, "training_step", fail)
    with pytest.raises(ValueError, match="from elsewhere"):
        fit(config, tmp_path)


def test_num_labels_cannot_contradict_the_data(config, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit(config, tmp_path, "--model.num_labels", "3")
    assert "num_labels" in capsys.readouterr().err
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {num_labels: 3, image_size: 8, optimization: {learning_rate: 1.0}}")
    with pytest.raises(SystemExit, match=r"overlay\.yaml sets model\.image_size, model\.num_labels; the data decide"):
        fit(config, tmp_path, "--config", str(config), "--config", str(overlay))


def test_torchrun_with_too_few_devices_is_refused(config, tmp_path, monkeypatch):
    # Silent failure 4: two unrelated trainings into the same files.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=r"started 2 processes.*--trainer.strategy ddp --trainer.devices 2"):
        fit(config, tmp_path)


def test_run_names_are_names(tmp_path):
    for name in ("../up", "a/b", ".hidden", ""):
        with pytest.raises(ValueError, match="the name of a run is"):
            new_run_folder(tmp_path, name)


def test_a_failed_publication_says_how_to_try_again(config, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    hub.fail("create_repo", "status", status=403)
    with pytest.raises(SystemExit, match=r"complete but .*(?s:.*)swin-hf push .*tiny user/digits"):
        words = ["--trainer.max_epochs", "1", "--data.splits.limit_train", "48", "--push", "user/digits"]
        fit(config, tmp_path, *words)
    assert (tmp_path / "tiny" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        (None, "user/new", "there is no access token"),
        ("hf_unknownTOKENunknownTOKEN", "user/new", "the Hub does not accept the token"),
        (READER, "reader/new", r"reader/new does not exist and cannot be made \(the token may only read\)"),
        (READER, "user/there", "the token does not give access to user/there"),
        (WRITER, "stranger/new", r"stranger/new does not exist and cannot be made \(the token belongs to user\)"),
        (WRITER, "stranger/there", "the token does not give access to stranger/there"),
        (WRITER, "nowhere", "'nowhere' is not a repository id"),
        (WRITER, "unreachable/new", "the Hub cannot be reached"),
    ],
)
def test_a_push_that_will_be_refused_is_told_before_the_first_step(
    config, tmp_path, hub, monkeypatch, capsys, token, repo, said
):
    hub.create("user/there")
    hub.create("stranger/there")
    address = "http://127.0.0.1:9" if repo.startswith("unreachable") else hub.url
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(swin_hf.hub.remote, "WAITS", ())
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert fit(config, tmp_path / "runs", "--push", repo) == 1
    output = capsys.readouterr()
    assert re.search(rf"(?m)^error: .*{said}", output.err) and "Traceback" not in output.err
    assert not (tmp_path / "runs").exists() and "epoch" not in output.out


@pytest.mark.parametrize("family", ["swin_hf", pytest.param("swin", marks=pytest.mark.slow)])
# huggingface_hub 2.4 hands its HTTP client raw bytes when it uploads.
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_a_run_from_one_repository_of_the_hub_to_another(config, tmp_path, hub, family):
    """--model.weights takes a Hub id, --push publishes; between them, weights, facts and card."""
    sizes = CONFIG["model"]["network"]["overrides"] | {"image_size": 16, "patch_size": 4, "window_size": 4}
    if family == "swin":
        SwinForImageClassification(SwinConfig(**sizes, num_labels=3)).save_pretrained(tmp_path / "start")
    else:
        fields = sizes | {"num_labels": 3}
        network = SwinHFForImageClassification(SwinHFConfig.from_preset("swin_digits_patch4_window4_32", **fields))
        network.save_pretrained(tmp_path / "start")
    api = HfApi(endpoint=hub.url)
    api.create_repo("user/start")
    (tmp_path / "start" / "README.md").write_text("---\nlicense: mit\n---\n")
    commit = api.upload_folder(repo_id="user/start", folder_path=tmp_path / "start").oid
    words = ["--config", str(config), "--runs", str(tmp_path), "--model.weights", "user/start"]
    process = start(
        *words,
        "--push",
        "user/result",
        "--trainer.max_epochs",
        "1",
        HF_ENDPOINT=hub.url,
        HF_HOME=str(tmp_path / "home"),
    )
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert f"published: {hub.url}/user/result/tree/{hub.log('user/result')[0].id}" in output
    there = hub.files("user/result")
    for name in ("model.safetensors", "training_facts.json"):
        assert there[name] == (tmp_path / "tiny" / "model" / name).read_bytes()
    facts = json.loads(there["training_facts.json"])
    assert (facts["base_model"], facts["base_model_revision"]) == ("user/start", commit)
    assert facts["base_model_license"] == "mit"
    card = there["README.md"].decode()
    assert "base_model: user/start" in card and commit in card and "\nlicense: mit\n" in card
    assert resolve(str(tmp_path / "tiny")).license == "mit"  # a run that starts from this run


def test_a_start_that_is_nowhere_is_an_error_of_one_line(config, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.chdir(tmp_path)  # where the first part of the id is not a folder
    message = "there is no folder runs/model here, and "
    with pytest.raises(SystemExit, match=message):
        fit(config, tmp_path / "out", "--model.weights", "runs/model")
    assert not list(tmp_path.iterdir())


def start(*words, **environment):
    command = [sys.executable, str(ROOT / "recipes" / "finetune.py"), "fit", *words]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_sigterm_saves_and_exits_143_and_the_same_command_goes_on(config, tmp_path):
    # Silent failures 14 and 15: by default the state is lost and the exit code says that all is well.
    words = ["--config", str(config), "--runs", str(tmp_path), "--ckpt_path", "last", "--trainer.max_epochs", "500"]
    process = start(*words)
    last = tmp_path / "tiny" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + PATIENCE
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, output
    step = torch.load(last, weights_only=True)["global_step"]
    assert step > 0 and (tmp_path / "tiny" / "model" / "model.safetensors").is_file()
    resume = output.split("resume with: ")[1].splitlines()[0]
    assert resume.endswith(f"fit --config {tmp_path}/tiny/config.yaml --name tiny --ckpt_path last")
    epochs = step // 10 + 1  # of 10 batches
    words = ["--config", str(config), "--runs", str(tmp_path), "--ckpt_path", "last"]
    assert run_recipe(SwinClassifier, config, ["fit", *words, "--trainer.max_epochs", str(epochs)]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == epochs * 10


@pytest.mark.slow
def test_ctrl_c_exits_130_with_the_best_weights_and_the_command_that_goes_on(config, tmp_path):
    process = start("--config", str(config), "--runs", str(tmp_path), "--trainer.max_epochs", "500")
    best = tmp_path / "tiny" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + PATIENCE
    while not best.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    AutoModelForImageClassification.from_pretrained(tmp_path / "tiny" / "model")
    step = torch.load(best, weights_only=True)["global_step"]
    command = shlex.split(re.search(r"(?m)^resume with: swin-hf (.*)$", output)[1])
    epochs = str(step // 10 + 1)
    again = subprocess.run(
        [sys.executable, "-m", "swin_hf.cli", *command, "--runs", str(tmp_path), "--trainer.max_epochs", epochs],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert torch.load(best, weights_only=True)["global_step"] == 10 * (step // 10 + 1)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["tiny"]


def test_unreadable_pictures_of_all_ranks_are_counted(config, tmp_path):
    for number in range(48):
        picture = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (number * 5, 80, 30)).save(picture)
        if number in (3, 10, 20, 21, 31):
            picture.write_bytes(b"half a file")
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(22000 + os.getpid() % 20000),
    ]
    words = ["--config", str(config), "--config", "ddp", "--runs", str(tmp_path)]
    words += ["--data.dataset", "imagefolder", "--data.data_files", "null", "--data.data_dir", str(tmp_path / "photos")]
    words += ["--data.reading.on_error", "skip", "--data.batch_size", "4", "--data.splits.test_fraction", "0.2"]
    words += ["--trainer.devices", "2", "--trainer.num_nodes", "1"]
    done = subprocess.run(
        [sys.executable, *command, str(ROOT / "recipes" / "finetune.py"), "fit", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "5 pictures could not be read (skip)" in done.stdout + done.stderr
    facts = json.loads((tmp_path / "tiny" / "model" / "training_facts.json").read_text())
    assert facts["data"]["unreadable"] == 5


@pytest.mark.slow
def test_the_default_recipe_reaches_its_promise(tmp_path):
    process = start("--runs", str(tmp_path))
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    facts = swin_hf.hub.facts.TrainingFacts.load(tmp_path / "digits" / "model")
    accuracy = next(m.value for m in facts.metrics if (m.name, m.split) == ("accuracy", "test"))
    assert accuracy >= 0.96, output


@pytest.mark.slow
@pytest.mark.parametrize("late", [None, 0, 1], ids=["together", "first node 5 s later", "second node 5 s later"])
def test_two_nodes_on_loopback_train_one_model(config, tmp_path, late):
    words = ["--config", str(config), "--config", "ddp", "--runs", str(tmp_path)]
    words += ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--data.batch_size", "8"]
    launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    launch += ["--master-port", str(21000 + os.getpid() % 20000)]
    # Each node starts as soon as its own launcher does: a static rendezvous waits in the process group only.
    wait = "import runpy, sys, time; time.sleep(float(sys.argv.pop(1))); sys.argv.pop(0); runpy.run_path(sys.argv[0], "
    wait += "run_name='__main__')"
    script = tmp_path.parent / f"{tmp_path.name}-late.py"
    script.write_text(wait)
    nodes = [
        subprocess.Popen(
            [
                sys.executable,
                *launch,
                "--node-rank",
                str(rank),
                str(script),
                "5" if rank == late else "0",
                str(ROOT / "recipes" / "finetune.py"),
                "fit",
                *words,
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=PATIENCE)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]  # one run, not two
    facts = swin_hf.hub.facts.TrainingFacts.load(tmp_path / "tiny" / "model")
    assert facts.hardware["devices"] == 2
    assert sum(map(sum, facts.confusion_matrix.counts)) == 360  # every test picture once
