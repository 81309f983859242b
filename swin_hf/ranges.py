"""The ranges of numbers that a user gives, checked where they are defined."""

import math
from numbers import Real
from typing import Any


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
