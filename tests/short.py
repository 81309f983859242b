"""Options of training in short: tests say ``short(SwinClassifier, learning_rate=1e-3)``, and the group is found."""

import inspect
from dataclasses import replace

from swin_hf.training.options import RENAMED


def grouped(owner, **options):
    """The arguments of a constructor, from options under names of their own."""
    parameters = inspect.signature(owner).parameters
    section = "data" if "reading" in parameters else "model"
    given = {name: value for name, value in options.items() if name in parameters}
    for name, value in options.items():
        if name not in parameters:
            _, group, option = RENAMED[f"{section}.{name}"].split(".")
            given[group] = replace(given.get(group, parameters[group].default), **{option: value})
    return given


def short(owner, *args, **options):
    """What a class or function gives for them, see :func:`grouped`."""
    return owner(*args, **grouped(owner, **options))
