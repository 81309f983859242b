"""Memory: how much a machine has, and the message for an allocation that failed."""

import os
import re
import sys
from pathlib import Path


def check_batch(batch_size: int, num_channels: int, image_size: tuple[int, int]) -> None:
    """Refuse a batch whose float32 pixels alone exceed the memory that is free.

    Linux grants more memory than there is and then kills the process, so that no error would be raised later.

    Raises:
        ValueError: Gives both sizes and the remedy.
    """
    height, width = image_size
    needed, free = 4 * batch_size * num_channels * height * width, free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"a batch of {batch_size} images of {height}x{width} pixels takes {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB of memory are free; choose a smaller image_size or batch_size"
        )


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
    asked = re.search(r"allocate ([\d.]+ ?(?:bytes|[KMGTPE]iB))", text)
    there = re.search(r"([\d.]+ [KMGT]iB) is free", text) if on_device else None
    free = there[1] if there else None if on_device or not (left := free_memory()) else f"{left / 2**30:.1f} GiB"
    return (
        "the memory is used up"
        + (f": {_readable(asked[1])} more were asked for" if asked else "")
        + (f"; {free} are free" if free else "")
        + "; choose a smaller batch or image size, or a smaller model"
    )


def _readable(size: str) -> str:
    return f"{int(size.split()[0]) / 2**30:.1f} GiB" if size.endswith("bytes") else size
