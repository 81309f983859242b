"""Where a model is: paths are looked up here, ids on the Hub, and never the one for the other."""

import json
import socket

import pytest
import torch
from PIL import Image

from swin_hf import SwinHFForImageClassification
from swin_hf.cli import main
from swin_hf.loading import find_model, local_path, split_hub_id
from swin_hf.training import SwinClassifier, SwinMaskedImageModeler
from swin_hf.training.tasks.distillation import load_teacher


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to open a connection ends the test."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_, **__: pytest.fail("the network was asked"))


@pytest.fixture
def run_folder(tiny_model, tmp_path):
    """What a training run leaves: the model in ``model/``, checkpoints, and no configuration of its own."""
    tiny_model.save_pretrained(tmp_path / "runs" / "digits" / "model")
    (tmp_path / "runs" / "digits" / "checkpoints").mkdir()
    (tmp_path / "runs" / "digits" / "config.yaml").write_text("seed: 1")
    return tmp_path / "runs" / "digits"


PATHS = ["./x", "runs/nothing", "runs/digits/nothing", "runs/x/model", "/abs/olute", "x.pth", "user/x.safetensors", "x"]
PATHS += [
    "~/nothing/here",
    "~nobody/x",
    "../x/y",
    "C:\\models\\x",
    "models\\x",
    "C:/models/x",
    "user/",
    "a/b/c",
    ".hidden/x",
]


@pytest.mark.parametrize("source", PATHS)
def test_path_that_does_not_exist_is_never_looked_up_on_the_network(run_folder, no_network, monkeypatch, source):
    monkeypatch.chdir(run_folder.parents[1])
    with pytest.raises(ValueError, match=r"does not exist; give the folder of a model or of a training run"):
        find_model(source)


@pytest.mark.parametrize("source", PATHS)
@pytest.mark.parametrize("option", ["the start", "the start of masked image modelling", "the teacher"])
def test_training_looks_no_path_up_on_the_network(option, source, run_folder, no_network, monkeypatch):
    monkeypatch.chdir(run_folder.parents[1])
    start = {
        "the start": lambda: SwinClassifier(weights=source),
        "the start of masked image modelling": lambda: SwinMaskedImageModeler(weights=source),
        "the teacher": lambda: load_teacher(source, {0: "cat", 1: "dog"}, 3),
    }
    with pytest.raises(ValueError, match="does not exist; give the folder of a model or of a training run"):
        start[option]()


def test_training_starts_from_the_folder_of_a_run(run_folder):
    theirs = SwinHFForImageClassification.from_pretrained(run_folder / "model").state_dict()
    ours = SwinClassifier(weights=str(run_folder)).model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("verb", ["predict", "info", "export", "explain", "convert"])
def test_every_verb_says_so(verb, run_folder, no_network, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    more = {"export": ["--to", "onnx"], "info": [], "convert": ["out", "--to", "timm"]}.get(verb, ["a.png"])
    assert main([verb, "runs/x/model", *more]) == 2
    assert "'runs/x/model' does not exist" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "runs"]


def test_ids_of_the_hub_are_told_from_paths(run_folder, monkeypatch):
    monkeypatch.chdir(run_folder.parents[1])
    assert local_path("user/model") is None and local_path("user/model@v1.0") is None
    assert split_hub_id("user/model@feature/x") == ("user/model", "feature/x", None)
    assert split_hub_id("user/swin-tiny_1.5") == ("user/swin-tiny_1.5", None, None)


def test_run_folder_stands_for_its_model(run_folder):
    assert local_path(run_folder) == run_folder / "model" == local_path(run_folder / "model")
    weights = run_folder / "model" / "model.safetensors"
    assert local_path(str(weights)) == weights
    with pytest.raises(ValueError, match=r"holds no config.json; did you mean .*digits"):
        local_path(run_folder.parent)


def test_verbs_take_a_run_folder(run_folder, tmp_path, capsys):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    assert main(["info", str(run_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == str(run_folder / "model")
    answers = []
    for source in (run_folder, run_folder / "model"):
        assert main(["predict", str(source), str(tmp_path / "a.png"), "--json"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert main(["explain", str(run_folder), str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png")]) == 0
    assert main(["convert", str(run_folder), str(tmp_path / "out.pth"), "--to", "timm"]) == 0
