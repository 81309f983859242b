"""Times of calls that take turns, peak memory, and the limits of the machine that they ran on."""

import contextlib
import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, is talkative

import torch
import transformers


class OutOfTime(BaseException):
    """The limit has passed; what is measured by then is kept. Not an Exception, which compilers catch."""


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Seconds of one call, the mean of ``repeats`` in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def take_turns(
    calls: dict[str, Callable[[], Any]], device: str, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Time calls in turn, after two rounds to warm up, for about ``seconds`` and at least ``least`` rounds.

    If the limit of the run passes meanwhile, what is measured by then counts, from three rounds on.
    """
    for call in calls.values():
        seconds_of(call, device)
    estimate = {name: seconds_of(call, device) for name, call in calls.items()}
    repeats = {name: max(1, int(0.01 / value)) for name, value in estimate.items()}
    rounds = max(least, int(seconds / sum(estimate[name] * repeats[name] for name in calls)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    try:
        for _ in range(min(rounds, 200)):
            for name, call in calls.items():
                times[name].append(seconds_of(call, device, repeats[name]))
    except OutOfTime:
        if min(map(len, times.values())) < 3:  # too few to tell the machine's mood from a difference
            raise
    return times


def peak_memory(call: Callable[[], Any], device: str) -> float | None:
    """MiB that a call needs on top of what was used before it; None on a device that does not count."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronise(device)
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return round(peak / 2**20, 1)


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """The machine's own limits: TFLOP/s of a large matrix product and GB/s of a copy, read and write counted."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    products = [lambda: a @ b]
    if device == "cpu" and torch.backends.mkldnn.is_available():  # torch has two libraries; the limit is the better
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    source = torch.randn(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    calls = {str(number): product for number, product in enumerate(products)}
    times = take_turns({**calls, "copy": lambda: target.copy_(source)}, device, 2.0, least=5)
    fastest = min(min(times[name]) for name in calls)
    return {
        "matmul_tflops": round(2 * side**3 / fastest / 1e12, 4),
        "copy_gbs": round(2 * source.nbytes / min(times["copy"]) / 1e9, 1),
    }


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions and date of a measurement."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name in ("timm", "torchvision", "torchcodec", "triton"):
        with contextlib.suppress(ImportError):
            versions[name] = __import__(name).__version__
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{processor_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {"hardware": hardware, "versions": versions, "date": datetime.date.today().isoformat()}


def processor_name() -> str:
    """Name of the processor as Linux knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
