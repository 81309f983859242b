"""The wheel in an environment of its own, far from the checkout, trains by its command and from Python."""

import io
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import PATIENCE
from hub_server import WRITER
from PIL import Image

import swin_hf
from swin_hf import SwinHFForImageClassification

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with the wheel; the libraries are those of this one, which take gigabytes."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    venv.create(folder / "env", with_pip=True, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "env")}))
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "libraries.pth").write_text("\n".join(libraries))  # their own .pth files, with the checkout, do not count
    (wheel,) = folder.glob("*.whl")
    run(folder / "env" / "bin" / "python", "-m", "pip", "install", "--no-index", "--no-deps", wheel, cwd=folder)
    return folder / "env" / "bin" / "python"


def run(*command, cwd, **variables):
    """Run a command without a trace of the checkout, and of what is set for pip; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_CONFIG_FILE": os.devnull} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_is_that_of_the_wheel(python, tmp_path):
    code = "import sys, swin_hf; print(swin_hf.__file__, *sys.path, sep='\\n')"
    file, *paths = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(python.parents[1]) and str(ROOT) not in paths


def test_the_command_trains_in_an_empty_folder(python, tmp_path):
    words = ["train", "--config", "digits", "--trainer.max_epochs", "1"]
    said = run(python.parent / "swin-hf", *words, cwd=tmp_path)
    assert "epoch   1/1" in said and "best weights: runs/digits/model" in said
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    model = tmp_path / "runs" / "digits" / "model"
    assert {"config.json", "model.safetensors", "training_facts.json"} <= {path.name for path in model.iterdir()}


def test_three_lines_of_python_train(python, tmp_path):
    lines = [
        "from swin_hf.training import train",
        "run = train(config='digits', trainer={'max_epochs': 1})",
        "print('found', type(run.model).__name__, run.metrics['test_accuracy'] > 0.1)",
    ]
    assert "found SwinHFForImageClassification True" in run(python, "-c", "\n".join(lines), cwd=tmp_path)


def test_the_line_of_a_job_installs_trains_and_publishes(python, hub, tmp_path):
    """Word for word as in the guide, with the wheel for PyPI and a loopback Hub for huggingface.co."""
    guide = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    (line,) = re.findall(r'"(pip install swin-hf && .+)"', guide)
    for split, height in (("train", 40), ("val", 44), ("test", 48)):
        for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            file = io.BytesIO()
            Image.new("RGB", (40, height), colour).save(file, "png")
            hub.put("datasets/user/photos", {f"{split}/{name}/0.png": file.getvalue()})
    run(python, "-m", "pip", "uninstall", "--yes", "swin-hf", cwd=tmp_path)
    variables = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1"}
    variables["PIP_IGNORE_INSTALLED"] = "1"  # the libraries of this environment have the checkout
    variables |= {"PIP_FIND_LINKS": str(python.parents[2]), "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITER}
    variables |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    said = run("bash", "-c", line, cwd=tmp_path, **variables)
    assert "Successfully installed swin" in said and "epoch  30/30" in said
    pulled = swin_hf.pull("user/photos-swin", endpoint=hub.url).path
    for name in ("config.json", "model.safetensors"):
        mine, theirs = (Path(folder, name).read_bytes() for folder in (tmp_path / "runs" / "photos" / "model", pulled))
        assert mine == theirs or name == "config.json"
    assert SwinHFForImageClassification.from_pretrained(pulled).config.id2label == {0: "blue", 1: "red"}
