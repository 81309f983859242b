"""Foreign text, above all the names of classes, comes out of terminals, figures and cards as it went in."""

import re

import numpy as np
import pytest
from markdown_it import MarkdownIt

from swin_hf.hub.facts import ClassScore, ConfusionMatrix, TrainingFacts
from swin_hf.hub.model_card import template_environment
from swin_hf.hub.pictures import draw_confusion
from swin_hf.hub.pictures import draw_pictures as draw_card_pictures
from swin_hf.text import one_line
from swin_hf.training.callbacks import keep_figure, to_pixels
from swin_hf.training.tasks.classification import score_table
from swin_hf.training.tasks.sheets import draw_pictures

NAMES = [
    r"$\frac$",
    r"$\mathbb{R$",
    "a$b$c",
    r"x_1^2 \alpha {y}",
    "two\nlines\tand a tab",
    "<b>bold</b> &amp; <!-- gone -->",
    "a|b `c` *d* ~~e~~ [f](g)",
    "قطة",
    "\u202eturned",
    "red\x1b[31m",
    "- item",
    "1. first",
    "# heading",
    "---",
    "2)",
    "+ plus",
    "word " * 60,
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_card_shows_the_name_that_was_given(name):
    """CommonMark's reference rules read the cell of a table and the entry of a list."""
    escaped = template_environment().filters["escaped"](name)
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = reader.parse(f"| Label | n |\n|---|---:|\n| {escaped} | 7 |\n\n0. {escaped}\n")
    texts = [token for token in tokens if token.type == "inline"]
    assert len(texts) == 5, escaped
    for found in (texts[2], texts[4]):
        assert {child.type for child in found.children} <= {"text", "text_special"}
        assert "".join(child.content for child in found.children) == one_line(name)
    assert texts[3].content == "7"
    assert "$" not in escaped  # the Hub renders formulas


def test_one_line_keeps_words_and_shows_what_would_move_the_cursor():
    assert one_line("two\nlines\u2028three") == "two lines three"
    assert one_line("red\x1b[31m\u202eback") == r"red\x1b[31m\u202eback"
    assert one_line("می\u200cخواهم 👩\u200d🔬") == "می\u200cخواهم 👩\u200d🔬"
    short = one_line("n01440764 tench, Tinca tinca, number 17", 20)
    assert len(short) == 20 and short.startswith("n01440764") and short.endswith("r 17")
    assert one_line("\ud800").encode() == rb"\ud800"


def test_figures_draw_any_name(tmp_path):
    counts = np.eye(len(NAMES), dtype=int)
    figure = draw_confusion(counts, NAMES)
    assert to_pixels(figure, dpi=20).std() > 0
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown[2] == "a$b$c" and "\n" not in "".join(shown) and max(map(len, shown)) <= 32
    assert to_pixels(draw_pictures([np.zeros((4, 4, 3))] * len(NAMES), [one_line(name, 32) for name in NAMES])).std()
    facts = TrainingFacts(
        confusion_matrix=ConfusionMatrix(NAMES, counts.tolist(), r"$\split$"),
        curves={r"val_$\loss$": [[1, 1.0], [2, 0.5]]},
    )
    assert len(draw_card_pictures(facts, tmp_path)) == 2


def test_the_table_of_a_test_has_one_line_for_each_name():
    lines = score_table([ClassScore(name, 1.0, 1.0, 1.0, 3) for name in NAMES]).splitlines()
    assert len(lines) == len(NAMES) + 1
    assert all(re.search(r"1\.0000 +1\.0000 +1\.0000 +3$", line) for line in lines[1:])


def test_a_figure_that_fails_is_a_warning(tmp_path):
    class Trainer:
        loggers = ()

    def broken():
        raise ValueError("no such font")

    with pytest.warns(UserWarning, match="confusion_matrix could not be drawn, the run goes on .*no such font"):
        keep_figure(Trainer(), tmp_path, "confusion_matrix", broken)
    assert not list(tmp_path.iterdir())
