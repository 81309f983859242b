"""The cards of the released architectures, and the script that writes them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE
from hub_server import metadata_problems

from model_cards.render import PUBLISHED, render, write_cards
from swin_hf import list_presets

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
DIGITS = "swin_digits_patch4_window4_32"


def test_every_preset_has_its_card_and_every_card_its_preset():
    assert {path.stem for path in CARDS.glob("*.md")} == set(list_presets())
    assert set(PUBLISHED) <= set(list_presets())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_base_patch4_window6_192_simmim", DIGITS])
def test_card_is_up_to_date(name):
    card = render(name)
    assert card == (CARDS / f"{name}.md").read_text(encoding="utf-8"), "run `make cards`"
    assert metadata_problems(card) == ([], [])


def test_what_differs_is_written_and_what_has_no_preset_is_removed(tmp_path):
    (tmp_path / "gone.md").write_text("x")
    outdated = [f"{name}.md" for name in ("gone", DIGITS)]
    assert write_cards(tmp_path, [DIGITS], check=True) == outdated
    assert [path.name for path in tmp_path.iterdir()] == ["gone.md"]
    assert write_cards(tmp_path, [DIGITS]) == outdated
    assert [path.name for path in tmp_path.iterdir()] == [f"{DIGITS}.md"]
    assert write_cards(tmp_path, [DIGITS], check=True) == []


@pytest.mark.slow
def test_the_script_compares_and_writes(tmp_path):
    def run(*arguments):
        command = [sys.executable, str(tmp_path / "render.py"), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)

    shutil.copytree(CARDS, tmp_path, dirs_exist_ok=True)
    (tmp_path / f"{DIGITS}.md").write_text("old")
    checked = run("--check")
    assert checked.returncode == 1 and checked.stdout == f"{DIGITS}.md is out of date; run `make cards`\n"
    written = run()
    assert written.returncode == 0 and written.stdout == f"{DIGITS}.md written\n"
    for path in CARDS.glob("*.md"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), "run `make cards`"


def test_continuous_integration_compares_every_card_before_the_tests():
    command = "model_cards/render.py --check"
    assert f"python {command}\npython -m pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"$(RUN) {command}" in (ROOT / "Makefile").read_text(encoding="utf-8").split("check:")[1].split("\n\n")[0]


def test_unknown_preset_is_a_sentence():
    with pytest.raises(ValueError, match="unknown preset 'swin_tny'"):
        render("swin_tny")
