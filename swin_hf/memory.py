"""Memory: how much a machine has, whether freed memory is kept, and the message for an allocation that failed."""

import ctypes
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def check_batch(batch_size: int, num_channels: int, image_size: tuple[int, int]) -> None:
    """Raise ValueError for a batch whose float32 pixels alone exceed the free memory.

    Linux grants more memory than there is and then kills the process, so that no error would be raised later.
    """
    height, width = image_size
    _refuse_more_than_is_free(batch_size, image_size, 4 * num_channels * height * width, "takes")


def check_training(
    batch_size: int, image_size: tuple[int, int], config: Any, stages: Sequence[bool], bytes_per_number: int = 4
) -> None:
    """Raise ValueError for a batch whose training on the CPU certainly needs more memory than is free.

    Every block keeps for the backward pass, of each token: the inputs of its two norms, queries, keys and values, the
    output of the attention, and both sides of the activation in the MLP.

    Args:
        batch_size: Images at a time, of all processes of the machine.
        image_size: Height and width in pixels.
        config: Configuration of a Swin.
        stages: Whether each stage is trained; others keep nothing.
        bytes_per_number: 4, or 2 in half precision.
    """
    (height, width), numbers = (-(-side // patch) for side, patch in zip(image_size, config.patch_hw, strict=True)), 0
    for depth, channels, is_trained in zip(config.depths, config.stage_dims, stages, strict=True):
        numbers += is_trained * depth * height * width * channels * (6 + 2 * int(config.mlp_ratio))
        height, width = -(-height // 2), -(-width // 2)
    _refuse_more_than_is_free(batch_size, image_size, bytes_per_number * numbers, "takes at least", "in training")


def _refuse_more_than_is_free(batch: int, image: tuple[int, int], of_each: int, takes: str, when: str = "") -> None:
    needed, free = batch * of_each, free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"a batch of {batch} images of {image[0]}x{image[1]} pixels {takes} {needed / 2**30:.1f} GiB"
            f"{when and f' {when}'} and {free / 2**30:.1f} GiB of memory are free; choose a smaller image_size or "
            "batch_size" + (", or network.gradient_checkpointing" if when else "")
        )


def keep_freed_memory() -> None:
    """Let the C library of this process keep the memory that it frees, for the next tensor.

    Linux's asks the system for every block over 32 MiB and gives it back at once, and the first write to new memory
    takes several times as long as the next. On other systems nothing changes.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # glibc's
        mallopt(-4, 0)  # M_MMAP_MAX: no block comes from the system by itself
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back


def free_memory() -> int | None:
    """Bytes that programs can still take; the memory of the machine if the system does not say, or None."""
    facts = Path("/proc/meminfo")
    if facts.is_file() and (match := re.search(r"^MemAvailable:\s+(\d+) kB", facts.read_text(), re.MULTILINE)):
        return int(match[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def memory_sentence(error: BaseException) -> str | None:
    """The message for an allocation that failed, of Python, NumPy or torch on any device; None for other errors."""
    text = str(error)
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    if not (isinstance(error, MemoryError) or on_device or "can't allocate memory" in text):
        return None
    sentence = "the memory is used up"
    if asked := re.search(r"allocate ([\d.]+) ?(bytes|[KMGTPE]iB)", text):
        size = f"{int(asked[1]) / 2**30:.1f} GiB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
        sentence += f": {size} more were asked for"
    if on_device:
        there = re.search(r"([\d.]+ [KMGT]iB) is free", text)
        sentence += f"; {there[1]} are free" if there else ""
    elif left := free_memory():
        sentence += f"; {left / 2**30:.1f} GiB are free"
    return sentence + "; choose a smaller batch or image size, or a smaller model"
