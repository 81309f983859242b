"""The guides in docs/ do what they say: their Python runs, block after block, in a fresh folder."""

import ast
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import PATIENCE
from hub_server import WRITER

DOCS = Path(__file__).parents[1] / "docs"
PATHS = os.pathsep.join(filter(None, [str(DOCS.parent), os.environ.get("PYTHONPATH")]))
GUIDES = ["distributed.md", "finetune.md", "share.md", "trainer.md"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(script: Path, **environment: str) -> str:
    names = {"PYTHONPATH": PATHS, "PYTHONWARNINGS": "default"} | environment
    command = [sys.executable, script.name]
    done = subprocess.run(command, cwd=script.parent, env=os.environ | names, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", GUIDES)
def test_links_of_a_guide_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", (DOCS / name).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (DOCS / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune.md", "trainer.md"])
def test_guide_runs(name, tmp_path):
    (tmp_path / "guide.py").write_text("\n".join(blocks(name)))
    printed = run(tmp_path / "guide.py")
    assert "accuracy" in printed
    assert {path.name for path in tmp_path.iterdir()} <= {"guide.py", "runs", "photos"}


def test_sharing_runs_on_a_hub_of_our_own(hub, tmp_path):
    (tmp_path / "guide.py").write_text("\n".join(blocks("share.md")))
    assert "swin-digits" in run(tmp_path / "guide.py", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    assert "model.safetensors" in hub.files("user/swin-digits")


@pytest.mark.slow
def test_two_sharded_processes_train_as_one(tmp_path):
    """The same global batches and weights: the mean loss after some steps is that of a single process."""
    found = []
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
        script = [str(DOCS / "fsdp2.py"), "--processes", str(processes), "--steps", "6", "--drop-path", "0"]
        names = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launch, *script],
            cwd=tmp_path,
            env=names,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(float(re.findall(r"'train_loss': ([\d.]+)", done.stdout)[-1]))
    assert found[0] == pytest.approx(found[1], abs=1e-4) and found[0] < 3


TWO_PROCESSES = """
from lightning.pytorch import Trainer, seed_everything
from swin_hf.training import ImageDataModule, SwinClassifier
if __name__ == "__main__":
    seed_everything(0)
    data = ImageDataModule("swin_hf:digits", image_size=32, batch_size=32)
    data.setup("fit")
    model = SwinClassifier("swin_digits_patch4_window4_32", image_size=32, id2label=data.id2label)
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False,
                      enable_checkpointing=False, enable_progress_bar=False, logger=False)
    trainer.fit(model, data)
    if trainer.is_global_zero:
        print({name: float(value) for name, value in trainer.callback_metrics.items()})
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'ray[train]'")
def test_two_workers_of_ray_train_as_two_processes_do(tmp_path):
    (tmp_path / "two_processes.py").write_text(TWO_PROCESSES)
    commands = [[str(DOCS / "ray_train.py"), "--workers", "2"], [str(tmp_path / "two_processes.py")]]
    found = []
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(ast.literal_eval(re.findall(r"^\{'learning_rate.*\}$", done.stdout, re.MULTILINE)[-1]))
    assert found[1].items() <= found[0].items() and found[1]["val_images"] == 144


def test_a_job_is_asked_for_as_the_guide_says(hub, tmp_path):
    guide = (DOCS / "distributed.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^hf jobs run .*?(?=^```)", guide, re.DOTALL | re.MULTILINE)
    words = shlex.split(text.replace("\\\n", " "))
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": WRITER}
    done = subprocess.run(
        [Path(sys.executable).with_name("hf"), *words[1:3], "--detach", *words[3:]],  # else it waits for the log
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (job,) = hub.jobs
    assert (job["flavor"], job["timeoutSeconds"]) == ("a10g-large", 6 * 3600)
    assert job["secrets"] == {"HF_TOKEN": WRITER} and WRITER not in done.stdout + done.stderr
    assert job["command"] == ["bash", "-c", words[-1]] and words[-1].startswith("pip install swin-hf && swin-hf train")


def test_notebook_has_the_blocks_of_its_guide():
    cells = json.loads((DOCS / "finetune.ipynb").read_text(encoding="utf-8"))["cells"]
    assert ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] == [
        block.rstrip("\n") for block in blocks("finetune.md")
    ]


@pytest.mark.slow
def test_notebook_executes(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", PATHS)
    notebook = nbformat.read(DOCS / "finetune.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any("test_accuracy" in str(cell.get("outputs")) for cell in notebook.cells)
