"""The ranges of numbers that a user gives, checked where they are defined."""

import math
from dataclasses import field, fields
from numbers import Real
from typing import Any, get_args


def check_range(name: str, value: Any, interval: str) -> None:
    """Refuse a number that is outside of its interval.

    Args:
        name: Name of the option, for the message.
        value: Number, a list of numbers, or None, which is never refused.
        interval: As mathematics writes it, such as ``[0, 1)``; ``inf`` for no limit. Infinity itself is never inside.

    Raises:
        ValueError: Names the option, the value and the interval.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for number in value if isinstance(value, list | tuple) else [value]:
        if number is None:
            continue
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        if not (isinstance(number, Real) and math.isfinite(number) and above and below):
            raise ValueError(f"{name} is {value}; it must be in {interval}")


def ranged(default: Any, interval: str) -> Any:
    """A field of a dataclass whose numbers are in an interval; :func:`check_fields` checks them."""
    return field(default=default, metadata={"interval": interval})


def choice(default: Any, choices: Any) -> Any:
    """A field of a dataclass that is one of the values of a ``Literal``; :func:`check_fields` checks it."""
    return field(default=default, metadata={"choices": get_args(choices)})


def check_fields(options: Any) -> None:
    """Check the fields of a group of options that were made by :func:`ranged` and :func:`choice`.

    Raises:
        ValueError: Names the option after its group (``splits.seed``), its value and what it may be.
    """
    group = type(options).__name__.lower()
    for option in fields(options):
        name, value = f"{group}.{option.name}", getattr(options, option.name)
        if "interval" in option.metadata:
            check_range(name, value, option.metadata["interval"])
        choices = option.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise ValueError(f"{name} is {value!r}; it must be {' or '.join(map(repr, choices))}")
