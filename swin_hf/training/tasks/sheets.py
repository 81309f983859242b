"""Sheets of test pictures: some drawn by lot, which a card shows where it is asked to, and others of a task's own."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from swin_hf.segment import colour
from swin_hf.text import one_line

from ..data.sampling import gathered

LONGEST_NAME = 32  # characters
NO_CLASS = -1  # number of the pixels without a class
NAMED_CLASSES, LEGEND_COLUMNS = 48, 6  # of a legend
CAPTION_LINES = 6
COVER = 0.6  # share of the class's colour in an overlay

Picture = np.ndarray[Any, Any]  # (H, W, 3) in [0, 1]


@dataclass(frozen=True)
class Shown:
    """What a sheet shows of one picture."""

    pictures: Sequence[Picture]  # the picture, and others made of it that are shown to its right
    captions: Sequence[str]  # above each of them
    file: str = ""  # what the picture is called
    pixels: Counter[int] = field(default_factory=Counter)  # of each class, for the legend


class Sheet:
    """The ``count`` pictures of a test with the highest values of something, the highest first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: list[tuple[float, Shown]] = []

    def offer(self, values: Iterable[float], show: Callable[[int], Shown]) -> None:
        """Keep the pictures of a batch whose values are among the highest so far; ``show`` makes that at a place."""
        for place, value in enumerate(values):
            if len(self.kept) < self.count or value > self.kept[-1][0]:
                found = [*self.kept, (float(value), show(place))]
                self.kept = sorted(found, key=lambda pair: -pair[0])[: self.count]

    def gather(self) -> None:
        """Keep the highest of all processes; collective."""
        self.kept = sorted(gathered(self.kept), key=lambda pair: -pair[0])[: self.count]


def draw_sheet(entries: Sequence[Shown], names: Sequence[str], files: Sequence[str] = ()) -> Figure:
    """Draw a sheet with ``files`` below its pictures and a legend of the classes on them, the most frequent first."""
    pictures = [picture for entry in entries for picture in entry.pictures]
    captions = [caption for entry in entries for caption in entry.captions]
    width = len(entries[0].pictures)
    figure = draw_pictures(pictures, captions, width * min(len(entries), 4 if width == 1 else 2), files)
    if pixels := sum((entry.pixels for entry in entries), Counter[int]()):
        numbers = [number for number, _ in pixels.most_common(NAMED_CLASSES)]
        labels = ["no class" if number == NO_CLASS else one_line(names[number], LONGEST_NAME) for number in numbers]
        handles = [Patch(facecolor=class_colour(number), edgecolor="black", linewidth=0.5) for number in numbers]
        if len(pixels) > len(numbers):
            labels.append(f"and {len(pixels) - len(numbers)} more")
            handles.append(Patch(alpha=0))
        blanks = [" "] * len(labels)  # matplotlib leaves out a label that begins with an underscore
        legend = figure.legend(handles, blanks, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=8)
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set(text=label, parse_math=False)
    return figure


def class_colour(number: int) -> tuple[float, float, float]:
    """The colour of a class in [0, 1], that of the overlays of ``swin-hf predict``; white for pixels without one."""
    red, green, blue = (255, 255, 255) if number == NO_CLASS else colour(number)
    return red / 255, green / 255, blue / 255


def overlay(picture: Picture, classes: Tensor) -> Picture:
    """A picture under the colours of its classes ``(H, W)``."""
    numbers, places = classes.unique(return_inverse=True)
    colours = np.array([class_colour(number) for number in numbers.tolist()])
    return (1 - COVER) * picture + COVER * colours[places.numpy()]


def caption(columns: Sequence[str], answer: Sequence[Any]) -> str:
    """What ``predictions.csv`` says of a picture, a cell on each line."""
    cells = [f"{cell:.3g}" if isinstance(cell, float) else cell or "none" for cell in answer]
    lines = [one_line(f"{column} {cell}", LONGEST_NAME) for column, cell in zip(columns, cells, strict=True)]
    more = [f"and {len(lines) - CAPTION_LINES} more"] if len(lines) > CAPTION_LINES else []
    return "\n".join(lines[:CAPTION_LINES] + more)


def draw_pictures(
    pictures: Sequence[Picture], captions: Sequence[str], columns: int = 4, files: Sequence[str] = ()
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
