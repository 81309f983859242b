"""Matching of two tables of classes, by name.

Placeholders (``LABEL_0``, ``LABEL_1``, ... or ``0``, ``1``, ...) do not count as names. They are matched by number
where both tables have nothing else, and, with a warning, where a model has nothing else and as many classes as the
data.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from swin_hf.text import shorten


class ClassMismatchError(ValueError):
    """Two tables of classes that cannot be matched; the message shows both."""


def class_table(id2label: Mapping[Any, Any] | None) -> list[str]:
    """Names in the order of their numbers, which are texts in a JSON file."""
    names = {int(number): str(name) for number, name in (id2label or {}).items()}
    return [names[number] for number in sorted(names)]


def has_names(table: Sequence[str]) -> bool:
    """Whether a table has names, not only the numbers of its classes."""
    return any(name not in (f"LABEL_{number}", str(number)) for number, name in enumerate(table))


def match_classes(
    wanted: Sequence[str], known: Sequence[str], whose: str = "the data", model: str = "the model"
) -> list[int]:
    """The number in ``known``, the classes of a model, of each class in ``wanted``, the classes of the data.

    Both are in the order of their numbers; a model may have classes that the data has not. Messages call the owners of
    the tables ``whose`` and ``model``.

    Raises:
        ClassMismatchError: If a name is unknown to the model or occurs there twice, or only the model has names.
    """
    wanted, known = list(wanted), list(known)
    if wanted == known:
        return list(range(len(wanted)))
    counts = Counter(known)
    lost = [name for name in wanted if counts[name] != 1]
    if not lost:
        return [known.index(name) for name in wanted]
    if not has_names(known) and len(wanted) == len(known):
        if has_names(wanted):
            warnings.warn(
                f"{model} has no names for its {len(known)} classes: the names of {whose} are used in their order,"
                f" {_listed(wanted)}",
                stacklevel=2,
            )
        return list(range(len(wanted)))
    raise ClassMismatchError(
        f"the classes of {whose} are not classes of {model}: {whose} has {_listed(wanted)}; {model} has"
        f" {_listed(known)}; classes are matched by name, and {_listed(lost)} cannot be found; give the classes the"
        f" names of {model}"
    )


def require_finite(logits: Tensor) -> Tensor:
    """Return logits ``(B, num_labels)``; ValueError if any is NaN or infinite."""
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(
            f"the model gives NaN or infinite scores for {int((~finite).sum())} of {len(finite)} pictures; its weights"
            " are damaged, or too large for 16 bits: check the file they came from, or compute in float32"
        )
    return logits


def _listed(table: Sequence[str]) -> str:
    return shorten([*map(repr, table)], 10) or "none"
