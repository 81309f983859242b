"""The verbs of the command line ``swin-hf``: one module of this folder for each.

A verb's module has ``add_arguments(parser)`` and ``run(args) -> int``; those that train have ``main(words) -> int``.
It is imported only when the verb is used: :mod:`swin_hf_cli` does that.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from swin_hf.predict import DEVICES, DTYPES, PictureError, find_pictures
from swin_hf_cli import VERBS, main

__all__ = ["VERBS", "main"]

Item = TypeVar("Item")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a verb that runs a model: where, and in which precision."""
    parser.add_argument("--device", default="auto", help=f"{', '.join(DEVICES)}, or cuda:1 and so on (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="precision (default: that of the weights)")


def pictures_of(arguments: list[str], option: str = "") -> list[str]:
    """What :func:`~swin_hf.predict.find_pictures` finds; PictureError for an argument that leads to no picture."""
    found, problems = find_pictures(arguments)
    if problems:
        raise PictureError(f"{option and f'{option}: '}{problems[0]}")
    return found


def watch(items: Iterable[Item], total: int, work: str = "Classifying") -> Iterable[Item]:
    """Show a progress bar over several items on a terminal."""
    if total == 1 or not sys.stderr.isatty():
        return items
    return track(items, work, total=total, console=Console(stderr=True), transient=True)
