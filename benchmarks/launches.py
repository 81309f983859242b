"""Time the launches that ``kernels_triton.choose_launch`` could choose, on the GPU of this machine.

    python -m benchmarks.launches --json launches.json

For each problem (a window, channels of a head, a dtype, a direction), each launch is compared with the one chosen today
and timed on the maps of all stages of a model, shifted and not, weighted by the blocks of the stage. Kernels compile in
processes of their own, side by side, and come from Triton's cache when they are timed.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.multiprocessing
from torch import Tensor

from swin_hf.model import kernels_triton
from swin_hf.model.kernels_triton import Launch
from swin_hf.model.windows import Pair, window_geometry

from .peers import disagreement
from .sections import said

# Window, side of the first map, heads of its stage, images: Swin-T and Swin-B at 224 pixels, Swin-B at 384.
PROBLEMS = {
    "tiny 224": (7, 56, 3, 256),
    "base 224": (7, 56, 4, 128),
    "base 256, window 8": (8, 64, 4, 128),
    "base 384, window 12": (12, 96, 4, 32),
}
BLOCKS = (2, 2, 6, 2)  # of each stage
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OCCUPANCIES = (1, 2, 3, 4, 6, 8)  # programs on a multiprocessor, which need no compilation


def candidates(tokens: int) -> list[tuple[int, int, int, int]]:
    """Blocks of queries and keys, warps and stages that are worth a try."""
    if tokens <= 64:
        return [(64, 64, warps, stages) for warps, stages in itertools.product((2, 4, 8), (1, 2, 3))]
    blocks = [(32, 32, 2), (32, 32, 4), (64, 16, 4), (64, 32, 4), (64, 32, 8), (64, 64, 4), (128, 16, 8), (128, 32, 8)]
    return [(*block, stages) for block, stages in itertools.product(blocks, (2, 3))]


def calls_of(
    problem: tuple[int, int, int, int], dtype: torch.dtype, forward: bool, images: int
) -> Iterator[tuple[int, Callable[[], Any]]]:
    """For each stage and shift: how many blocks have it, and a call of the operator."""
    side, size, heads, _ = problem
    window: Pair = (side, side)
    for stage, blocks in enumerate(BLOCKS):
        grid = (size >> stage, size >> stage)
        for shifted in (False, True):
            geometry = window_geometry(grid, window, shifted)
            if shifted and geometry.shift == (0, 0):
                continue
            h = heads << stage
            torch.manual_seed(0)
            qkv = torch.randn(images, *geometry.padded, 3 * 32 * h, device="cuda", dtype=dtype)
            grad = torch.randn(images, *geometry.padded, 32 * h, device="cuda", dtype=dtype)
            table = torch.randn((2 * side - 1) ** 2, h, device="cuda")
            given = (h, [*geometry.grid, *geometry.window, *geometry.shift, *window], 32**-0.5, False)
            weight = blocks if size >> stage == side else blocks // 2
            if forward:
                yield weight, partial(kernels_triton._attend, qkv, table, *given)
            else:
                yield weight, partial(kernels_triton._attend_backward, grad, qkv, table, *given, True)


def milliseconds(call: Callable[[], Any], rounds: int = 8) -> float:
    """Median of a call on the device."""
    for _ in range(2):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def first_of(out: Any) -> Tensor:
    """The output, or of a backward the gradient of qkv, on the CPU."""
    return (out[0] if isinstance(out, tuple) else out).float().cpu()


def timed(calls: list[tuple[int, Callable[[], Any]]], launch: Launch | None, truth: Tensor) -> dict[str, Any]:
    """Milliseconds of a launch, or of those chosen today, for each call and weighted; it must compute the same."""
    choose = kernels_triton.choose_launch if launch is None else lambda *_: launch
    with patch.object(kernels_triton, "choose_launch", choose):
        difference = disagreement(first_of(calls[0][1]()), truth)
        if not difference < 1e-2:
            raise AssertionError(f"it differs by {difference:.1e}")
        each = [milliseconds(call) for _, call in calls]
    total = sum(weight * value for (weight, _), value in zip(calls, each, strict=True))
    return {"ms": round(total, 4), "calls": [round(value, 4) for value in each]}


def best(calls: list[tuple[int, Callable[[], Any]]], launches: list[Launch], truth: Tensor) -> list[dict[str, Any]]:
    """Launches that run, the fastest first; the others are named."""
    rows = []
    for launch in launches:
        try:
            rows.append({"launch": launch, **timed(calls, launch, truth)})
        except Exception as error:
            print(f"{launch}: {said(error)[:120]}")
    return sorted(rows, key=lambda row: row["ms"])


def build(work: list[tuple[str, str, bool, tuple[int, int, int, int]]]) -> None:
    """Compile kernels into Triton's cache, on maps that are small; one that does not compile is left to the timing."""
    for name, dtype, forward, candidate in work:
        with patch.object(kernels_triton, "choose_launch", lambda *_, c=candidate: Launch(*c, 1)):
            for _, call in calls_of(PROBLEMS[name], DTYPES[dtype], forward, 1):
                try:
                    call()
                except Exception:
                    break


def main() -> int:
    """Compile, compare, time, and print the fastest launches beside the one chosen today."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where all times go")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["bf16"])
    parser.add_argument("--problems", nargs="+", choices=tuple(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2))
    options = parser.parse_args()
    work = [
        (name, dtype, forward, candidate)
        for name, dtype, forward in itertools.product(options.problems, options.dtypes, (True, False))
        for candidate in candidates(PROBLEMS[name][0] ** 2)
    ]
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=build, args=(work[start :: options.jobs],)) for start in range(options.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    results = []
    for name, dtype, forward in itertools.product(options.problems, options.dtypes, (True, False)):
        problem = PROBLEMS[name]
        calls = list(calls_of(problem, DTYPES[dtype], forward, problem[3]))
        truth = first_of(calls[0][1]())
        timed(calls, None, truth)  # warms up
        rows = [{"launch": "as chosen", **timed(calls, None, truth)}]
        tried = [Launch(*candidate, 2) for candidate in candidates(problem[0] ** 2)]
        tried = [row["launch"] for row in best(calls, tried, truth)[:6]]
        tried = [launch._replace(occupancy=occupancy) for launch in tried for occupancy in OCCUPANCIES]
        rows += best(calls, tried, truth)
        direction = "forward" if forward else "backward"
        results.append({"problem": name, "dtype": dtype, "direction": direction, "rows": rows})
        options.json.write_text(json.dumps(results))
        print(f"{name}, {dtype}, {direction}")
        for row in rows[:7]:
            print(f"  {row['launch']} {row['ms']} ms {row['calls']}", flush=True)
        del calls
    return 0


if __name__ == "__main__":
    sys.exit(main())
