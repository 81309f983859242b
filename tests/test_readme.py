"""What the README says is run: its Python in one process, its commands one by one."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swin_hf import SwinHFConfig, SwinHFForImageClassification

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workspace(tmp_path):
    """A folder with what the README takes for granted: a trained model, and the repository."""
    from transformers import ViTImageProcessor

    torch.manual_seed(0)
    config = SwinHFConfig.from_preset("swin_digits_patch4_window4_32", id2label={i: str(i) for i in range(10)})
    SwinHFForImageClassification(config).save_pretrained(tmp_path / "runs/digits/model")
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, do_convert_rgb=True)
    processor.save_pretrained(tmp_path / "runs/digits/model")
    for name in ("docs", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_readme_is_short_and_names_its_parts():
    assert len(README.splitlines()) <= 200
    for heading in ("Install", "Use", "Fine-tune", "Share", "Speed", "Differences from the original", "Map"):
        assert f"\n## {heading}" in README
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), f"{link} does not exist"


def test_python_blocks_run_in_order(workspace):
    code = "\n".join(blocks("python"))
    assert code
    script = workspace / "readme.py"
    script.write_text(code + "\nprint('maps', [tuple(m.shape) for m in maps], tuple(evidence.shape))\n")
    before = set(workspace.iterdir())
    printed = run([sys.executable, str(script)], workspace)
    assert set(workspace.iterdir()) == before, "running the README leaves files behind"
    assert "maps [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)] (1, 32, 32)" in printed


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_test_command_is_what_ci_runs():
    ci = (ROOT / ".ci/run").read_text().splitlines()
    assert ci[-1] == "python -m pytest -n auto"
    assert "`python -m pytest -n auto`" in README
    assert any("pip install" in line and "'.[dev]'" in line for line in ci)


def test_what_a_block_needs_is_made_by_a_block_above():
    code = "\n".join(re.findall(r"```(?:python|bash)\n(.*?)```", README, flags=re.DOTALL))
    for need, maker in (("runs/digits", "swin-hf train"), ("import timm", "pip install timm"), ("--to onnx", "[onnx]")):
        assert 0 <= code.index(maker) <= code.index(need), f"{need} is used before {maker}"
    for path in re.findall(r"docs/figures/\w+\.\w+", code):
        assert (ROOT / path).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [line for line in commands() if not line.startswith("pip") and "pytest" not in line]
)
def test_command_runs(command, workspace):
    words = shlex.split(command)
    if words[0] == "make":
        assert run(["make", "--dry-run", *words[1:]], ROOT)
    elif words[0] == "swin-hf":
        if words[1] == "push":
            words[2] = "runs/digits/model"
        if words[1] in ("train", "pretrain"):
            words += ["--trainer.fast_dev_run", "true"]
        before = set(workspace.iterdir())
        run([sys.executable, "-m", "swin_hf.cli", *words[1:]], workspace)
        assert set(workspace.iterdir()) == before, "running the README leaves files outside of runs/"
    else:
        raise AssertionError(f"nobody runs {command!r}")
