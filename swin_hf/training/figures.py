"""Figures of a training run; drawn without pyplot, which has global state and may need a display."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

LONGEST_NAME = 32  # characters


def draw_pictures(
    pictures: Sequence[np.ndarray[Any, Any]], captions: Sequence[str], columns: int = 4, files: Sequence[str] = ()
) -> Figure:
    """A sheet of pictures ``(H, W, 3)`` in [0, 1], each with a caption above it and the name of its file below."""
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.4 * rows), layout="constrained")
    for position, (picture, caption) in enumerate(zip(pictures, captions, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, position)
        axes.imshow(picture)
        axes.set_title(caption, fontsize=8, parse_math=False)
        axes.set_xlabel(files[position - 1] if files else "", fontsize=7, parse_math=False)
        axes.set(xticks=[], yticks=[], frame_on=False)
    return figure


def to_pixels(figure: Figure, dpi: int = 100) -> np.ndarray[Any, Any]:
    """A figure as ``(H, W, 3)`` ``uint8`` pixels, for TensorBoard."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
