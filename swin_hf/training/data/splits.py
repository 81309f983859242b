"""Which rows are trained on, and which are held out: stratified shares, counts and the table of classes."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from swin_hf.ranges import Options, ranged
from swin_hf.text import one_line, text_table

from .sampling import Integers
from .shards import shorten
from .sources import Source, Targets

SHOWN_CLASSES = 30  # in the table of the classes


@dataclass(frozen=True)
class Splits(Options):
    """What is held out of the training split where the data set has no split of its own, and how much is trained on.

    Args:
        validation_fraction: Share of the training split to hold out when the dataset has no validation split.
        test_fraction: Share of the training split to hold out when the dataset has no test split.
        limit_train: Use only this many training pictures, drawn at random and stratified.
        balanced_sampling: Train on equally many pictures of each class in an epoch, which stays as long as it is: those
            of a rare class come several times, each time augmented anew.
        seed: Seed of the draws; another seed of the training does not change what is measured.
    """

    validation_fraction: float = ranged(0.1, "[0, 1)")
    test_fraction: float = ranged(0.0, "[0, 1)")
    limit_train: int | None = ranged(None, "[1, inf)")
    balanced_sampling: bool = False
    seed: int = ranged(0, "[0, 4294967295]")


def divide(source: Source, options: Splits) -> tuple[dict[str, Integers], dict[str, Targets], list[str]]:
    """Choose the rows of each split: those with a label, less what is held out of the training split.

    Returns:
        Rows and labels of each split, and the names of those that were held out.

    Raises:
        ValueError: If there is nothing to train on or to hold out, or a single class.
    """
    rows: dict[str, Integers] = {}
    labels: dict[str, Targets] = {}
    for name, split in source.splits.items():
        stored = np.zeros(len(split), dtype=np.int64) if source.label_column is None else source.labels(name)
        kept = np.flatnonzero(source.labelled(stored))
        if len(kept) < len(stored):
            rank_zero_warn(f"{len(stored) - len(kept)} of {len(stored)} rows of {name!r} have no label: left out")
        if name == "train" and len(kept) == 0:
            raise ValueError(f"no row of the training split has a label in column {source.label_column!r}")
        if len(kept):
            rows[name], labels[name] = kept, stored[kept]
    held_out = []
    fractions = {"test": options.test_fraction, "validation": options.validation_fraction}
    for name, fraction in fractions.items() if "train" in rows else ():
        if name in rows or fraction == 0:
            continue
        size = len(labels["train"])
        kept, held = stratified_split(source.strata(labels["train"]), round(fraction * size), options.seed)
        if len(held) == 0:
            what = f"{name}_fraction {fraction} of {size} training pictures is none"
            raise ValueError(f"{what}; give a {name} split or a larger fraction")
        rows[name], labels[name] = rows["train"][held], labels["train"][held]
        rows["train"], labels["train"] = rows["train"][kept], labels["train"][kept]
        held_out.append(name)
    limit = options.limit_train
    if limit is not None and limit < len(rows.get("train", ())):
        # The rows that would be held out and, where the classes cannot spare so many, some of the others.
        kept, held = stratified_split(source.strata(labels["train"]), limit, options.seed)
        drawn = np.sort(np.concatenate([held, kept[: limit - len(held)]]))
        rows["train"], labels["train"] = rows["train"][drawn], labels["train"][drawn]
    if source.label_column is not None and "train" in labels:
        source.check_training(labels["train"])
    return rows, labels, held_out


def announce_classes(source: Source, counts: Mapping[str, Integers]) -> None:
    """Print a table of the classes with the pictures found and used, and warn about those that cannot be learned.

    ``counts`` are the pictures of each class that are used, for each split.
    """
    names = source.class_names
    found = np.array([source.left_out.get(name, 0) for name in names])
    for split in source.splits:
        found = found + source.counts(source.labels(split))
    counts = {"found": found, "used": sum(counts.values(), np.zeros_like(found)), **counts}
    lines = [["id", "class", *counts]]
    for number, name in enumerate(names[:SHOWN_CLASSES]):
        lines.append([str(number), one_line(name), *(f"{count[number]:,}" for count in counts.values())])
    if len(names) > SHOWN_CLASSES:
        lines.append(["...", f"{len(names) - SHOWN_CLASSES} more classes", *("" for _ in counts)])
    lines.append(["", "all", *(f"{count.sum():,}" for count in counts.values())])
    rank_zero_info(f"{len(names)} classes\n{text_table(lines, left=1)}")
    missing = [name for name, count in zip(names, counts["train"], strict=True) if count == 0]
    if missing:
        rank_zero_warn(f"{len(missing)} classes have no training picture: {shorten(missing)}")


def stratified_split(labels: Integers, count: int, seed: int) -> tuple[Integers, Integers]:
    """Part rows into kept and ``count`` held-out ones, fewer if their classes (``labels``) cannot spare so many.

    The rows are sorted by class, at random within each class, and taken at even distances, so that the classes are in
    proportion. Every class keeps at least one row: ``datasets.train_test_split`` refuses classes with a single picture.

    Returns:
        Kept and held-out row numbers, each in ascending order.
    """
    random = np.random.default_rng(seed)
    order = np.lexsort((random.random(len(labels)), labels))
    is_first = np.diff(labels[order], prepend=-2) != 0  # one row of each class stays
    spare = order[~is_first]
    count = min(count, len(spare))
    places = ((np.arange(count) + random.random()) * (len(spare) / max(1, count))).astype(np.int64)
    held = np.sort(spare[places])
    return np.setdiff1d(np.arange(len(labels)), held), held
