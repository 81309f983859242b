"""What each shortcut of ``kernels_cpu.py`` gains on this processor: the model with all of them, and without each."""

import argparse
import statistics
from typing import Any
from unittest.mock import patch

import torch

from swin_hf.model import attention, kernels_cpu

from .clock import seconds_of
from .peers import build_ours

# How each shortcut is switched off: a module, a name in it, and the value that the name gets.
SHORTCUTS = {
    "products by oneDNN, with GELU": (kernels_cpu, "_ONEDNN_TYPES", ()),
    "a few images at a time": (kernels_cpu, "CACHED_BYTES", 2**62),
    "bias and mask kept": (attention, "only_evaluates", lambda *_: False),
    "a backward of attention": (attention, "may_attend_here", lambda *_: False),
}
OF_TRAINING = ("a backward of attention",)


def measure_shortcuts(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Time a model with every shortcut and without each of them, in turn."""
    from .sections import model_call

    torch.manual_seed(0)
    model, batch, training = build_ours(setting["preset"]), setting["batch_size"], setting["mode"] == "training"
    images = torch.randn(batch, model.config.num_channels, *model.config.image_hw)
    labels = torch.randint(model.config.num_labels, (batch,))
    call = model_call(model, {"execution": "eager", **setting}, images, labels)
    names = [name for name in SHORTCUTS if (name in OF_TRAINING) == training]
    times: dict[str, list[float]] = {name: [] for name in ("all", *names)}
    call()
    rounds = max(5, int(options.seconds / seconds_of(call, "cpu") / len(times)))
    for _ in range(rounds):
        times["all"].append(seconds_of(call, "cpu"))
        for name in names:
            with patch.object(*SHORTCUTS[name]):
                times[name].append(seconds_of(call, "cpu"))
    fastest = min(times["all"])
    rows = [
        {
            "name": name if name == "all" else f"without: {name}",
            "median_ms": round(statistics.median(values) * 1e3, 1),
            "min_ms": round(min(values) * 1e3, 1),
            "the shortcut gains": round(min(values) / fastest, 2),
            "rounds": rounds,
        }
        for name, values in times.items()
    ]
    return {"rows": rows, "left_out": {}}
