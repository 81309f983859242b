"""Settings in processes of their own: they build and compile side by side, and are timed one after the other.

Compilers take most of the time of a benchmark on a GPU, and use one core of many. While one process times its calls,
all others wait, so that each has the machine to itself.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing

from .sections import MEASURE, said

Outcome = dict[str, Any] | str  # what was measured, or why nothing was


def measure_alone(setting: dict[str, Any], options: argparse.Namespace) -> Outcome:
    """Measure one setting in this process."""
    try:
        return MEASURE[setting["section"]](setting, options)
    except Exception as error:  # the rest is measured all the same
        return said(error)
    finally:
        torch.compiler.reset()


def measure(settings: list[dict[str, Any]], options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Outcome]]:
    """Measure settings, ``options.jobs`` at a time; with one job, in this process."""
    if options.jobs == 1:
        yield from ((setting, measure_alone(setting, options)) for setting in settings)
        return
    for start in range(0, len(settings), options.jobs):
        yield from _measure_group(settings[start : start + options.jobs], options)


def _measure_group(
    settings: list[dict[str, Any]], options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], Outcome]]:
    context = torch.multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in settings]
    workers = [
        context.Process(target=_work, args=(theirs, setting, options), daemon=True)
        for (_, theirs), setting in zip(pairs, settings, strict=True)
    ]
    try:
        for worker, (_, theirs) in zip(workers, pairs, strict=True):
            worker.start()
            theirs.close()  # or the end of a worker would not be seen here
        deadline = time.monotonic() + options.build_limit
        first = [_receive(ours, deadline) for ours, _ in pairs]  # None: it is built, and waits for its turn
        for worker, outcome in zip(workers, first, strict=True):
            if outcome is not None:
                worker.kill()
        for setting, outcome, (ours, _) in zip(settings, first, pairs, strict=True):
            if outcome is None:
                ours.send(None)
                outcome = _receive(ours)
            yield setting, outcome or "it did not say what it measured"
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _receive(connection: Connection, deadline: float | None = None) -> Outcome | None:
    try:
        if deadline is not None and not connection.poll(max(0.0, deadline - time.monotonic())):
            return "it was not built in time"
        outcome: Outcome | None = connection.recv()
    except EOFError:
        return "its process ended"
    return outcome


def _work(connection: Connection, setting: dict[str, Any], options: argparse.Namespace) -> None:
    """Measure one setting in a process of its own; timed only when the parent says so."""

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        if setting["device"] == "cuda":
            torch.cuda.empty_cache()  # the others need the memory
        connection.send(None)
        connection.recv()
        yield

    if setting["section"] == "models":  # which builds, and takes its turn when it has built
        options.turn = turn
        outcome = measure_alone(setting, options)
    else:
        with turn():
            outcome = measure_alone(setting, options)
    connection.send(outcome)
