"""Classify images with a folder, a Hub id or a foreign checkpoint; or every pixel of them, with a segmenter.

A segmenter writes two files for each image into the folder --output: NAME_mask.png, whose palette indices are the class
numbers, and NAME_overlay.png with a legend. It prints the classes by their share of the pixels. A model of several
labels an image prints those that are more probable than not, a regression its numbers.

Unreadable images are reported and skipped. Exit code: 0 if every image was classified, 1 if some were not, 2 if there
was nothing to do.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from swin_hf.cli import add_device, watch
from swin_hf.predict import Guess, PictureError, find_pictures, has_names, load_classifier, predict
from swin_hf.ranges import COUNT, Number
from swin_hf.segment import is_segmenter, predict_masks
from swin_hf.text import one_line

Result = tuple[str, list[Guess]]
Attempt = tuple[str, list[Guess] | PictureError]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``swin-hf predict``."""
    parser.add_argument("model", metavar="MODEL", help="model, see swin-hf --help")
    found = "file, folder, glob pattern, http(s) address, or - for standard input"
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=found)
    count = Number(int, COUNT)
    parser.add_argument("--top-k", type=count, default=5, metavar="K", help="classes per image (default: 5)")
    parser.add_argument("--batch-size", type=count, default=16, metavar="N", help="images at a time (default: 16)")
    add_device(parser)
    parser.add_argument("--output", default="masks", metavar="FOLDER", help="of a segmenter's files (default: masks)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    form.add_argument("--csv", action="store_true", help="print CSV, one line for each image and class")


def run(args: argparse.Namespace) -> int:
    """Classify, print, and return the exit code."""
    sources, problems = find_pictures(args.images)
    for problem in problems:
        _report(problem)
    if not sources:
        return 2
    model, processor = load_classifier(args.model, device=args.device, dtype=args.dtype)
    if not has_names(model):
        unnamed = f"has no names for its {model.config.num_labels} classes; they are shown by number"
        _report(f"{args.model} {unnamed}: put id2label into its config.json")
    skipped: list[str] = []
    if is_segmenter(model):
        found = predict_masks(model, processor, sources, Path(args.output), top_k=args.top_k)
    else:
        found = predict(model, processor, sources, top_k=args.top_k, batch_size=args.batch_size)
    print_results = _print_json if args.json else _print_csv if args.csv else _print_table
    print_results(_successes(watch(found, len(sources)), skipped))
    if skipped or problems:
        _report(f"{len(skipped) + len(problems)} of {len(sources) + len(problems)} inputs could not be classified")
        return 1
    return 0


def _report(sentence: str) -> None:
    print(f"swin-hf predict: {sentence}", file=sys.stderr)


def _successes(results: Iterable[Attempt], skipped: list[str]) -> Iterator[Result]:
    for source, result in results:
        if isinstance(result, PictureError):
            skipped.append(source)
            _report(str(result))
        else:
            yield source, result


def _print_table(results: Iterator[Result]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True)
    for source, guesses in results:
        if not guesses:
            table.add_row(one_line(source), "-", "")
        for rank, guess in enumerate(guesses, start=1):
            name, ends = one_line(source) if rank == 1 else "", 1 < len(guesses) == rank
            table.add_row(name, one_line(guess.label), f"{guess.score:.4f}", end_section=ends)
    # A file or a pipe has no width, so no line is folded there.
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 10_000)
    console.print(table)


def _print_json(results: Iterator[Result]) -> None:
    """Print a list while it grows: each image as soon as it is known."""
    opening = "[\n"
    for source, guesses in results:
        result = {"image": source, "predictions": [asdict(guess) for guess in guesses]}
        print(opening + json.dumps(result), end="", flush=True)
        opening = ",\n"
    print("[]" if opening == "[\n" else "\n]")


def _print_csv(results: Iterator[Result]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("image", "rank", "index", "label", "score"))
    for source, guesses in results:
        for rank, guess in enumerate(guesses, start=1):
            writer.writerow((source, rank, guess.index, guess.label, f"{guess.score:.6f}"))
