"""The ranges of numbers that a user gives, checked where they are defined."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, get_args

SIDES = "[1, 16384]"  # of an image, in pixels
COUNT = "[1, inf)"


def check_range(name: str, value: Any, interval: str) -> None:
    """Raise ValueError for a number, or one of a list, that is outside of its interval; None is always accepted.

    The message calls it ``name``. An interval is written as in mathematics, such as ``[0, 1)`` or ``[1, inf)``.
    """
    for number in value if isinstance(value, list | tuple) else [value]:
        if number is not None and not _is_inside(number, interval):
            raise ValueError(f"{name} is {value}; it must be in {interval}")


def ranged(default: Any, interval: str, ascending: bool = False) -> Any:
    """A field of :class:`Options` whose numbers must be in an interval and, with ``ascending``, in that order."""
    return field(default=default, metadata={"interval": interval, "ascending": ascending})


def choice(default: Any, choices: Any) -> Any:
    """A field of :class:`Options` that is one of the values of a ``Literal``, or None."""
    return field(default=default, metadata={"choices": get_args(choices)})


@dataclass(frozen=True)  # so that the command line takes subclasses for dataclasses
class Options:
    """Base of the groups of options, which are dataclasses: fields of :func:`ranged` and :func:`choice` are checked."""

    group: ClassVar[str | None] = None  # its name in messages; the name of its class if not given

    def __post_init__(self) -> None:
        """Raise ValueError with the option and its group (``splits.seed``), its value and the allowed ones."""
        for option in fields(self):
            name = f"{self.group or type(self).__name__.lower()}.{option.name}"
            value, rule = getattr(self, option.name), option.metadata
            if "interval" in rule:
                check_range(name, value, rule["interval"])
            if rule.get("ascending") and sorted(value) != list(value):
                raise ValueError(f"{name} is {value}; give the lesser number first")
            if rule.get("choices") and value is not None and value not in rule["choices"]:
                raise ValueError(f"{name} is {value!r}; it must be {' or '.join(map(repr, rule['choices']))}")


@dataclass(frozen=True)
class Number:
    """Type of an argparse option that takes a number of an interval, see :func:`check_range`."""

    kind: type[int] | type[float]
    interval: str

    def __call__(self, text: str) -> int | float:
        """The number; ArgumentTypeError if the text is not one in the interval (argparse adds the option)."""
        try:
            number = self.kind(text)
        except ValueError:
            number = math.nan
        if not _is_inside(number, self.interval):
            what = "a whole number" if self.kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is given; it must be {what} in {self.interval}")
        return number


def one_or_two(option: str, sides: Sequence[int] | None) -> int | tuple[int, int] | None:
    """One side for a square, or height and width, of an option with ``nargs="+"``; ValueError if there are more."""
    match sides:
        case None | []:
            return None
        case [side]:
            return side
        case [height, width]:
            return height, width
    raise ValueError(f"{option} has {len(sides)} sides; give one for a square, or height and width")


def _is_inside(value: Any, interval: str) -> bool:
    is_real = isinstance(value, Real)
    if not (is_real and -math.inf < value < math.inf):  # also for NaN
        return False
    low, high = (float(end) for end in interval[1:-1].split(","))
    is_end = (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
    return bool(low < value < high or is_end)
