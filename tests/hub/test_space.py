"""A Space on the loopback Hub: what a push leaves there, and its program, which runs by itself and answers."""

import os
import re
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import PATIENCE
from hub_server import READER, WRITER
from PIL import Image

from swin_hf import cli
from swin_hf.hub import HubError, remote
from swin_hf.hub.space import push_space, space_files
from swin_hf.predict import classify, load_classifier, read_picture

# huggingface_hub 2.4 passes file objects to httpx2 as `data=`, which httpx2 deprecates; not ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
needs_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="gradio is not installed: pip install 'swin-hf[demo]'"
)
MODEL, SPACE = "user/tiny", "user/page"


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    tiny_model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.02, 0.04))


def test_without_gradio_nothing_is_sent(hub, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["push", str(folder), MODEL, "--space", SPACE]) == 2
    assert "gradio is not installed, and the Space pins it; run: pip install" in capsys.readouterr().err
    assert not hub.requests


@needs_gradio
def test_push_leaves_a_model_and_a_space_of_it(hub, folder, run_commands, tmp_path):
    command = ["push", str(folder), MODEL, "--space", SPACE]
    first, second = run_commands(command, command)
    assert first.code == second.code == 0, first.err + second.err
    assert f"Space: {hub.url}/spaces/{SPACE}" in first.out
    files, (commit, _) = hub.files(f"spaces/{SPACE}"), hub.log(f"spaces/{SPACE}")  # one commit after the empty one
    assert set(files) == {"README.md", "requirements.txt", "app.py"} and commit.title == "The page of swin-hf demo"
    header = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert header["sdk"] == "gradio" and header["app_file"] == "app.py" and header["models"] == [MODEL]
    assert re.fullmatch(r"\d+\.\d+\.\d+", header["sdk_version"])
    lines = files["requirements.txt"].decode().splitlines()
    assert all(re.fullmatch(r"[\w-]+(\[demo\])?==\d[\w.]*", line) for line in lines) and len(lines) == 8
    everything = b"".join(files.values()).decode()
    assert str(tmp_path) not in everything and str(Path.home()) not in everything and "hf_" not in lines
    assert f"{MODEL}@{hub.log(MODEL)[0].id}" in files["app.py"].decode()

    (tmp_path / "space").mkdir()
    for name, content in files.items():
        (tmp_path / "space" / name).write_bytes(content)
    assert answers_like_predict(tmp_path / "space", folder, hub.url)


def answers_like_predict(space: Path, folder: Path, endpoint: str) -> bool:
    """Run the program of a Space in a process of its own, and ask it over its API."""
    from gradio_client import Client, handle_file

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), "uint8")).save(space.with_name("noise.png"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = str(space.with_name("home"))
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": home, "HF_TOKEN": WRITER, "GRADIO_SERVER_PORT": str(port)}
    log = space.with_name("app.log")
    with log.open("w") as stream:
        app = subprocess.Popen(
            [sys.executable, "app.py"], cwd=space, env={**os.environ, **environment}, stdout=stream, stderr=stream
        )
    try:
        wait_for(port, app, log)
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        answer = client.predict(handle_file(space.with_name("noise.png")), api_name="/answer")[0]["confidences"]
    finally:
        app.terminate()
        app.wait()
    model, processor = load_classifier(str(folder))
    (guesses,) = classify(model, processor, [read_picture(str(space.with_name("noise.png")))])
    own = {guess.label: guess.score for guess in guesses}
    return {row["label"]: row["confidence"] for row in answer} == pytest.approx(own)


def wait_for(port: int, app: subprocess.Popen, log: Path) -> None:
    for _ in range(10 * PATIENCE):
        assert app.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@needs_gradio
def test_a_lost_answer_and_a_second_push_make_no_second_commit(hub):
    hub.create(MODEL)
    hub.fail("commit", "lost")
    assert push_space(SPACE, MODEL, None, endpoint=hub.url).created is False  # the second try finds it all
    assert push_space(SPACE, MODEL, None, endpoint=hub.url).created is False
    assert len(hub.log(f"spaces/{SPACE}")) == 2
    assert push_space(SPACE, MODEL, "0" * 40, endpoint=hub.url).created and len(hub.log(f"spaces/{SPACE}")) == 3


@needs_gradio
def test_a_space_of_a_private_model_is_private(hub, folder, run_commands):
    (done,) = run_commands(["push", str(folder), MODEL, "--private", "--space", SPACE])
    assert hub.repos[f"spaces/{SPACE}"].private
    assert "the model is private; give the Space a secret HF_TOKEN" in done.out


@needs_gradio
def test_a_space_of_somebody_else_and_a_token_that_only_reads_are_refused(hub, monkeypatch):
    hub.create(MODEL)
    hub.put(f"spaces/{SPACE}", {"app.py": b"import gradio\n"})
    with pytest.raises(HubError, match=f"the Space {SPACE} has an app.py of another kind; choose another name"):
        push_space(SPACE, MODEL, None, endpoint=hub.url)
    assert hub.files(f"spaces/{SPACE}") == {"app.py": b"import gradio\n"}
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match="use a token that may write to user"):
        push_space("user/other", MODEL, None, endpoint=hub.url)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="there is no access token"):
        push_space("user/other", MODEL, None, endpoint=hub.url)


@needs_gradio
def test_a_dry_run_shows_the_files_and_asks_nobody(hub, folder, capsys):
    assert cli.main(["push", str(folder), MODEL, "--space", SPACE, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "--- app.py of the Space" in printed and f'serve("{MODEL}", host=None)' in printed
    assert f"/spaces/{SPACE}" in printed.splitlines()[-1] and "dry run, not sent" in printed
    assert not hub.requests


@needs_gradio
def test_a_malformed_name_is_refused():
    with pytest.raises(ValueError, match="'page' is not a repository id"):
        space_files("page", MODEL, None)
