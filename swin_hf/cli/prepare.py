"""Make the pictures of a data set smaller, once, so that training decodes fewer pixels.

SOURCE is what `swin-hf train` takes: a folder of pictures, a data set on the Hub, a folder of `datasets`, or a format
(csv, json, parquet, ...) with --data-files. DESTINATION becomes a data set of parquet files with the same splits,
classes, labels and names of files; pictures whose shorter side is longer than --short-side are resized and stored as
JPEG, all others are stored as they are. A command that was interrupted goes on when it is given again.
"""

import argparse
from functools import partial

from swin_hf.cli import watch
from swin_hf.ranges import COUNT, SIDES, Number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``swin-hf prepare``."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="data set, as --data.dataset of swin-hf train")
    add("destination", metavar="DESTINATION", help="a new or empty folder, or that of an interrupted run")
    add("--short-side", type=Number(int, SIDES), default=292, metavar="N", help="pixels (default: 292, for 224 or 256)")
    add("--quality", type=Number(int, "[1, 100]"), default=95, metavar="N", help="of the JPEG files (default: 95)")
    add("--data-files", nargs="+", metavar="[SPLIT=]FILE", help="files of a format, such as train=a.csv test=b.csv")
    add("--data-dir", metavar="FOLDER", help="folder of a format, or a folder in the source")
    add("--config-name", metavar="NAME", help="configuration of a data set on the Hub")
    add("--revision", help="branch, tag or commit of a data set on the Hub")
    add("--image-column", metavar="NAME", help="column of the pictures; found by its type")
    add("--unlabelled", action="store_true", help="take pictures wherever they are in a folder, without classes")
    add("--on-error", choices=("raise", "skip"), default="raise", help="at an unreadable picture (default: raise)")
    add("--pictures-per-file", type=Number(int, COUNT), default=2000, metavar="N", help="(default: 2000)")


def run(args: argparse.Namespace) -> int:
    """Prepare, and say what is where; the exit code is 1 if pictures were left out."""
    from swin_hf.training import Reading  # takes seconds: it imports Lightning
    from swin_hf.training.data import Shrinking, prepare

    reading = Reading(
        config_name=args.config_name,
        revision=args.revision,
        image_column=args.image_column,
        labelled=not args.unlabelled,
    )
    shrinking = Shrinking(args.short_side, args.quality, args.pictures_per_file, args.on_error)
    files, bar = _by_split(args.data_files), partial(watch, work="Preparing")
    done = prepare(args.source, args.destination, files, args.data_dir, reading, shrinking, bar)
    for split, count in done.pictures.items():
        print(f"{split}: {count:,} pictures")
    if done.unreadable:
        examples = "\n  ".join(done.unreadable[:10])
        print(f"{len(done.unreadable)} pictures could not be read (skip):\n  {examples}")
    print(f"{done.folder}: {done.size / 2**20:,.1f} MiB")
    print(f"train on it: --data.dataset {done.folder} --data.data_dir null")
    return 1 if done.unreadable else 0


def _by_split(words: list[str] | None) -> list[str] | dict[str, str | list[str]] | None:
    """Files, each with the split before its first ``=``, as ``data_files`` of a data module."""
    pairs = [word.partition("=") for word in words or []]
    named: dict[str, list[str]] = {}
    for split, equals, file in pairs:
        if equals:
            named.setdefault(split, []).append(file)
    if sum(map(len, named.values())) not in (0, len(pairs)):
        raise ValueError("--data-files names the split of some files only; write SPLIT=FILE for all of them, or none")
    return dict(named) if named else words
