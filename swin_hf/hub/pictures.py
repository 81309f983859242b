"""The pictures of a card that are drawn from facts: the confusion matrix and the learning curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swin_hf.text import one_line

from .facts import TrainingFacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MATRIX, CURVES = "confusion_matrix.png", "learning_curves.png"
SAMPLES = "sample_pictures.png"  # that a test draws into the run folder
NAMED_CLASSES = 40  # with more, the labels cannot be read and only the colours are drawn
COUNTED_CLASSES = 30  # with more, the counts cannot be read
LONGEST_NAME = 24  # characters
COLOURS = {"train": "#1f4e9c", "val": "#d95f02", "other": "#4d4d4d"}  # of a split, in all figures
LINES = ("-", "--", ":", "-.")  # the quantities of a panel

Curves = Mapping[str, Sequence[Sequence[Any]]]  # name -> [step, value] points


def picture_names(facts: TrainingFacts) -> list[str]:
    """The pictures that can be drawn from the facts."""
    has_matrix = facts.confusion_matrix is not None and len(facts.confusion_matrix.labels) > 0
    has_curves = any(len(points) > 1 for points in facts.curves.values())
    return [MATRIX] * has_matrix + [CURVES] * has_curves


def draw_pictures(facts: TrainingFacts, folder: Path) -> list[Path]:
    """Draw the pictures that the facts allow; the same facts give the same bytes."""
    names = picture_names(facts)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        matrix = facts.confusion_matrix
        if name == MATRIX and matrix:
            title = f"Confusion matrix, {one_line(matrix.split, LONGEST_NAME)}"
            figure = draw_confusion(np.asarray(matrix.counts), matrix.labels, title)
        else:
            figure = draw_curves(facts.curves, facts.best_step)
        # Without the version of matplotlib in it, the file depends on nothing but its content.
        figure.savefig(folder / name, dpi=110, bbox_inches="tight", metadata={"Software": None})
    return [folder / name for name in names]


def draw_confusion(counts: np.ndarray[Any, Any], labels: Sequence[str], title: str = "Confusion matrix") -> "Figure":
    """Confusion matrix of images ``(classes, classes)``, rows are the truth; the colour is the share of its row."""
    from matplotlib.figure import Figure

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(3 + 0.4 * len(counts), 12)
    # The object interface: no window, no global state, safe in a training process that draws figures of its own.
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.046, label="share of the row")
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


def draw_curves(curves: Curves, best_step: int | None = None) -> "Figure":
    """Learning curves in up to three panels: losses, metrics, learning rate; the step that was kept is marked."""
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {"loss": [], "metrics": [], "learning rate": []}
    for name in sorted(curves):
        if not name.startswith("train_images"):
            kind = "learning rate" if name.startswith("learning_rate") else "metrics"
            panels["loss" if name.endswith("loss") else kind].append(name)
    panels = {title: names for title, names in panels.items() if names}
    rates = curves.get("learning_rate", [])
    peak = max(rates, key=lambda point: point[1] or 0.0) if rates else None
    figure = Figure(figsize=(4.5 * max(len(panels), 1), 4.0), layout="constrained")
    for position, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        styles = dict.fromkeys(("train", "val", "other"), 0)
        for name in names:
            split = name.split("_")[0] if name.startswith(("train_", "val_")) else "other"
            steps, values = zip(*curves[name], strict=True)
            axes.plot(
                steps,
                [np.nan if value is None else value for value in values],
                color=COLOURS[split],
                linestyle=LINES[styles[split] % len(LINES)],
                marker="." if len(steps) == 1 else None,
                label=name,
            )
            styles[split] += 1
        if peak is not None and peak != rates[0] and peak != rates[-1]:
            axes.axvline(peak[0], color="grey", linestyle="--", linewidth=1, label="warm-up ends")
        if best_step is not None:
            axes.axvline(best_step, color="black", linestyle=":", linewidth=1, label=f"best: step {best_step}")
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        legend = axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure
