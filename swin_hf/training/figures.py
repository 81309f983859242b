"""Figures of a training run; drawn without pyplot, so that no state and no display is touched."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from swin_hf.text import one_line

Curves = Mapping[str, Sequence[Sequence[float]]]  # name -> [step, value] points

# Up to this many classes the confusion matrix shows its counts and names.
MAX_LABELLED_CLASSES = 30
LONGEST_NAME = 32  # characters


def draw_curves(curves: Curves) -> Figure:
    """Learning curves: one panel for each quantity, such as the losses of training and validation."""
    panels: dict[str, list[str]] = {}
    for name in sorted(curves, key=lambda name: not name.endswith("loss")):
        if name.startswith("learning_rate"):
            panels.setdefault("learning rate", []).append(name)
        elif "_" in name and not name.startswith("train_images"):
            panels.setdefault("loss" if name.endswith("loss") else name.split("_")[1], []).append(name)
    if "learning rate" in panels:
        panels["learning rate"] = panels.pop("learning rate")  # the last
    figure = Figure(figsize=(4.5 * max(len(panels), 1), 3.4), layout="constrained")
    for position, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        for name in names:
            steps, values = zip(*curves[name], strict=True)
            marker = "." if len(steps) == 1 else None
            axes.plot(steps, values, label=name, marker=marker)
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_confusion(counts: np.ndarray[Any, Any], labels: Sequence[str]) -> Figure:
    """Confusion matrix, rows are the truth; the colour is the share of its row.

    Args:
        counts: ``(classes, classes)`` integers.
        labels: Names of the classes.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    labelled = len(labels) <= MAX_LABELLED_CLASSES
    side = min(2.5 + 0.45 * len(labels), 14.0) if labelled else 8.0
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if labelled:
        names = [one_line(label, LONGEST_NAME) for label in labels]
        # parse_math off: a label such as "a$b$" is text, here and wherever foreign text is drawn
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)
    return figure


def draw_pictures(pictures: Sequence[np.ndarray[Any, Any]], captions: Sequence[str], columns: int = 4) -> Figure:
    """A sheet of pictures ``(H, W, 3)`` in [0, 1], each with a caption."""
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.4 * rows), layout="constrained")
    for position, (picture, caption) in enumerate(zip(pictures, captions, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, position)
        axes.imshow(picture)
        axes.set_title(caption, fontsize=8, parse_math=False)
        axes.set_axis_off()
    return figure


def to_pixels(figure: Figure, dpi: int = 100) -> np.ndarray[Any, Any]:
    """A figure as ``(H, W, 3)`` ``uint8`` pixels, for TensorBoard."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
