"""The two pictures of a card, drawn from facts: the confusion matrix and the learning curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_hf.text import one_line

from .facts import TrainingFacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATRIX, CURVES = "confusion_matrix.png", "learning_curves.png"
NAMED_CLASSES = 40  # with more, the labels cannot be read and only the colours are drawn
COUNTED_CLASSES = 30  # with more, the counts cannot be read
LONGEST_NAME = 24  # characters


def picture_names(facts: TrainingFacts | None) -> list[str]:
    """The pictures that can be drawn from the facts."""
    names = []
    if facts and facts.confusion_matrix and facts.confusion_matrix.labels:
        names.append(MATRIX)
    if facts and any(len(points) > 1 for points in facts.curves.values()):
        names.append(CURVES)
    return names


def draw_pictures(facts: TrainingFacts | None, folder: Path) -> list[Path]:
    """Draw the pictures that the facts allow; the same facts give the same bytes."""
    names = picture_names(facts)
    if not names or facts is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        matrix = facts.confusion_matrix
        if name == MATRIX and matrix:
            title = f"Confusion matrix, {one_line(matrix.split, LONGEST_NAME)}"
            figure = draw_confusion(np.asarray(matrix.counts), matrix.labels, title)
        else:
            figure = _curves(facts)
        # Without the version of matplotlib in it, the file depends on nothing but its content.
        figure.savefig(folder / name, dpi=110, bbox_inches="tight", metadata={"Software": None})
    return [folder / name for name in names]


def draw_confusion(counts: np.ndarray[Any, Any], labels: Sequence[str], title: str = "Confusion matrix") -> "Figure":
    """Confusion matrix, rows are the truth; the colour is the share of its row.

    Args:
        counts: Images, ``(classes, classes)``.
        labels: Names of the classes.
        title: Title of the figure.
    """
    from matplotlib.figure import Figure

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(3 + 0.4 * len(counts), 12)
    # The object interface: no window, no global state, safe in a training process that draws figures of its own.
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.046, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, parse_math=False)
    if len(counts) <= NAMED_CLASSES:
        # parse_math off: a label such as "a$b$" is text
        names = [one_line(label, LONGEST_NAME) for label in labels]
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(counts) <= COUNTED_CLASSES:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            count = f"{counts[row, column]:.0f}"
            axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=7)
    return figure


def _curves(facts: TrainingFacts) -> "Figure":
    """Losses on the left, everything else on the right."""
    from matplotlib.figure import Figure

    losses = {name: points for name, points in sorted(facts.curves.items()) if "loss" in name and len(points) > 1}
    others = {name: points for name, points in sorted(facts.curves.items()) if "loss" not in name and len(points) > 1}
    panels = [panel for panel in (losses, others) if panel]
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.items():
            axes.plot([step for step, _ in points], [np.nan if y is None else y for _, y in points], label=name)
        if facts.best_step is not None:
            axes.axvline(facts.best_step, color="grey", linestyle=":", label="saved weights")
        axes.set(xlabel="step", title="loss" if panel is losses else "metrics")
        axes.grid(alpha=0.3)
        for text in axes.legend(fontsize=8).get_texts():
            text.set_parse_math(False)
    return figure
