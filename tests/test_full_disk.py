"""A disk that fills up: one sentence, nothing half written, and the same command goes on when there is room."""

import csv
import errno
import json
import os
import re
import resource
import subprocess

import pytest
import torch
import yaml
from conftest import TRAINING_WARNINGS
from full_disk import files_of_at_most
from PIL import Image
from safetensors import SafetensorError
from test_training import CONFIG, fit
from transformers import AutoModelForImageClassification

from swin_hf import SwinHFForImageClassification, SwinHFForMaskedImageModeling, pull, push
from swin_hf.cli import main
from swin_hf.files import full_disk, replacing, replacing_folder
from swin_hf.hub import HubError
from swin_hf.training import SwinMaskedImageModeler, run_recipe

pytestmark = [
    *TRAINING_WARNINGS,
    pytest.mark.filterwarnings("ignore:the best weights so far are in checkpoints/best.ckpt only"),
    pytest.mark.filterwarnings("ignore:the state of the interrupted epoch is not saved"),
    pytest.mark.filterwarnings("ignore:the figure .* could not be drawn"),
]

SAID = r"(?m)^error: .*{} cannot be written: the file is larger than the disk .* \(.* free there\); make room and run"


@pytest.fixture
def config(tmp_path):
    """A run of 3 steps an epoch."""
    values = {**CONFIG, "data": CONFIG["data"] | {"splits": {"limit_train": 48}, "num_workers": 0}}
    values["trainer"] = CONFIG["trainer"] | {"log_every_n_steps": 1}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def check_whole(run):
    """Whatever lies in a run folder can be read, and nothing of it is temporary."""
    for path in [path for path in run.rglob("*") if path.is_file()]:
        assert not path.name.startswith(".") and path.suffix not in (".tmp", ".partial"), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".yaml":
            assert yaml.safe_load(path.read_text())
        if path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        if path.suffix == ".csv":
            assert list(csv.DictReader(path.read_text().splitlines()))
    if (run / "model").exists():
        AutoModelForImageClassification.from_pretrained(run / "model")


@pytest.mark.parametrize(
    ("hook", "size", "epoch", "name"),
    [
        ("on_validation_end", 9_000, 1, "(best|last).ckpt"),
        ("on_test_epoch_end", 0, 0, "(metrics.csv|training_facts.json)"),
        pytest.param("setup", 0, 0, "(tiny|config.yaml)", marks=pytest.mark.slow),
        pytest.param("on_train_start", 0, 0, "(tiny|metrics.csv|hparams.yaml)", marks=pytest.mark.slow),
        pytest.param("on_train_start", 400, 0, "(tiny|metrics.csv|hparams.yaml)", marks=pytest.mark.slow),
        pytest.param("on_train_batch_end", 0, 1, "(tiny|metrics.csv)", marks=pytest.mark.slow),
        pytest.param("on_validation_end", 0, 1, "(tiny|metrics.csv|best.ckpt)", marks=pytest.mark.slow),
        pytest.param("on_train_epoch_end", 9_000, 1, "(best|last).ckpt", marks=pytest.mark.slow),
        pytest.param("on_train_end", 4_000, 0, "model", marks=pytest.mark.slow),
        pytest.param("on_test_epoch_end", 2_000, 0, "training_facts.json", marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_disk_fills_up_says_so_and_goes_on_when_there_is_room(
    config, tmp_path, capsys, hook, size, epoch, name
):
    values = yaml.safe_load(config.read_text())
    full = {"class_path": "full_disk.FullFrom", "init_args": {"hook": hook, "size": size, "epoch": epoch}}
    values["trainer"]["callbacks"] = [full]
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(values))
    runs, limits = tmp_path / "runs", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        code = fit(tmp_path / "full.yaml", runs, "--ckpt_path", "last")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    output = capsys.readouterr()
    assert code == 1
    error = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert re.search(SAID.format(name), error[0]), error
    assert "Traceback" not in output.err and "Errno" not in output.err + output.out
    for run in runs.glob("*"):  # a run that fails before its first step leaves no folder
        check_whole(run)
    assert fit(config, runs, "--config", str(config), "--ckpt_path", "last") == 0
    assert capsys.readouterr().out.count("best weights:") == 1
    (run,) = [run for run in runs.iterdir() if (run / "model").exists()]
    check_whole(run)
    assert len(json.loads((run / "model/training_facts.json").read_text())["curves"]["val_loss"]) == 2


@pytest.mark.parametrize(("hook", "size"), [("on_validation_end", 0), ("on_train_end", 4_000)])
def test_pre_training_says_it_too(config, tmp_path, capsys, hook, size):
    values = yaml.safe_load(config.read_text())
    values["model"]["masking"] = {"cell": 8}
    config.write_text(yaml.safe_dump(values))
    values["trainer"]["callbacks"] = [{"class_path": "full_disk.FullFrom", "init_args": {"hook": hook, "size": size}}]
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(values))
    runs, limits = tmp_path / "runs", resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ["fit", "--runs", str(runs), "--ckpt_path", "last"]
    try:
        assert run_recipe(SwinMaskedImageModeler, tmp_path / "full.yaml", words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(SAID.format(r"(tiny|metrics.csv|best.ckpt|reconstructions.png|model)"), error), error
    assert run_recipe(SwinMaskedImageModeler, config, [*words, "--config", str(config)]) == 0
    (run,) = [run for run in runs.iterdir() if (run / "model").exists()]
    SwinHFForMaskedImageModeling.from_pretrained(run / "model")
    assert not [path for path in run.rglob("*") if path.name.startswith(".") or path.suffix == ".partial"]


@pytest.fixture
def tiny_folder(tiny_model, tmp_path):
    """A saved model."""
    tiny_model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("verb", ["convert", pytest.param("export", marks=pytest.mark.slow), "explain", "card"])
def test_a_command_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(tiny_folder, tmp_path, capsys, verb):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (16, 16)).save(picture)
    out = tmp_path / "out"
    out.mkdir()
    words, target = {
        "convert": ([str(tiny_folder), str(out / "copy"), "--to", "swin_hf"], "copy"),
        "export": ([str(tiny_folder), "--to", "torch", "--output", str(out / "swin.pt2")], "swin.pt2"),
        "explain": ([str(tiny_folder), str(picture), "--output", str(out / "map.png")], "map.png"),
        "card": ([str(tiny_folder), "--write"], ""),  # drawn up in the folder of temporary files
    }[verb]
    before = sorted(tmp_path.rglob("*"))
    with files_of_at_most(50):
        assert main([verb, *words]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"swin-hf {verb}: \S*{target} cannot be written: .* \(.* free there\); make room.*\n", error)
    assert sorted(tmp_path.rglob("*")) == before
    assert main([verb, *words]) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; returns its folder and a function that sets its size in KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")

    def resize(kibibytes):
        subprocess.run(["mount", "-o", f"remount,size={kibibytes}k", folder], check=True)

    yield folder, resize
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize(
    "verb",
    [
        "convert",
        "explain",
        pytest.param("torch", marks=pytest.mark.slow),
        pytest.param("onnx", marks=pytest.mark.slow),
        pytest.param("openvino", marks=pytest.mark.slow),
    ],
)
def test_a_small_disk_is_told_and_left_as_it_was(tiny_folder, small_disk, tmp_path, capsys, verb):
    out, resize = small_disk
    picture = tmp_path / "picture.png"
    Image.new("RGB", (16, 16)).save(picture)
    words, target = {
        "convert": (["convert", str(tiny_folder), str(out / "copy"), "--to", "swin_hf"], "copy"),
        "explain": (["explain", str(tiny_folder), str(picture), "--output", str(out / "map.png")], "map.png"),
        "torch": (["export", str(tiny_folder), "--to", "torch", "--output", str(out / "swin.pt2")], "swin.pt2"),
        "onnx": (["export", str(tiny_folder), "--to", "onnx", "--output", str(out / "swin.onnx")], "swin.onnx"),
        "openvino": (["export", str(tiny_folder), "--to", "openvino", "--output", str(out / "swin.xml")], "swin.xml"),
    }[verb]
    assert main(words) == 2
    error = capsys.readouterr().err
    said = rf"swin-hf {words[0]}: \S*{target} cannot be written: the disk is full \(.* free there\); make room.*\n"
    assert re.search(rf"(?m)^{said}", error) and "Traceback" not in error
    assert not list(out.iterdir())
    resize(20_000)
    assert main(words) == 0


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the Hub's client's own
@pytest.mark.filterwarnings("ignore:Not enough free disk space:UserWarning")  # its own word, before it tries
@pytest.mark.parametrize("place", ["folder", "cache"])
def test_a_pull_onto_a_full_disk_says_so_and_the_next_one_is_whole(tiny_folder, small_disk, hub, place):
    out, resize = small_disk
    push(tiny_folder, "user/tiny", endpoint=hub.url)
    where = {"local_dir": out / "model"} if place == "folder" else {"cache_dir": out / "cache"}
    with pytest.raises(HubError, match=r"cannot be written: the disk is full \(.* free there\); make room"):
        pull("user/tiny", endpoint=hub.url, **where)
    resize(20_000)
    folder = pull("user/tiny", endpoint=hub.url, **where).path
    saved = SwinHFForImageClassification.from_pretrained(tiny_folder).state_dict()
    for name, value in SwinHFForImageClassification.from_pretrained(folder).state_dict().items():
        assert torch.equal(value, saved[name]), name


@pytest.mark.parametrize("write", [replacing, replacing_folder])
def test_what_a_kill_left_of_a_file_goes_with_its_next_write(tmp_path, write):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f".a.xml.{dead.pid}.partial", f".a.xml.{os.getppid()}.partial", f".b.xml.{dead.pid}.partial"):
        (tmp_path / name).mkdir()
    with write(tmp_path / "a.xml") as partial:
        (partial if write is replacing else partial / "c").write_text("whole")
    left = {f".a.xml.{os.getppid()}.partial", f".b.xml.{dead.pid}.partial", "a.xml"}  # of a living process, of another
    assert {path.name for path in tmp_path.iterdir()} == left


def test_the_reason_is_found_where_a_library_hides_it(tmp_path):
    def hidden(error):
        try:
            try:
                raise error
            finally:
                raise RuntimeError("unexpected pos 64 vs 0")  # as torch.save does
        except RuntimeError as outer:
            return outer

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (
        hidden(full),
        OSError(f"[Errno {errno.ENOSPC}] Error writing bytes to file. Detail: No space left on device"),  # of Arrow
        SafetensorError("I/O error: Disk quota exceeded (os error 122)"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(tmp_path / "named")),
    ):
        said = full_disk(error, tmp_path)
        message = r"/\S+ cannot be written: the (disk is full|quota is used up) \(.* free there\); make room"
        assert re.match(message, str(said))
    assert str(tmp_path / "named") in str(said)
    for error in (hidden(ValueError("no")), OSError(errno.ENOENT, "no", "a"), RuntimeError("no"), None):
        assert full_disk(error) is None
