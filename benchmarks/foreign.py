"""Models of other libraries: what it takes to load them here, and how fast they are on our backbone."""

import argparse
import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from swin_hf import replace_backbone

from .clock import take_turns

# Each loads from a folder, its argument. The imports come before the clock starts; memory is that of the process.
_OURS = "swin_hf.SwinHFForImageClassification.from_pretrained(folder)"
LOADS = {
    "transformers": "transformers.SwinForImageClassification.from_pretrained(folder)",
    "timm": "timm.create_model('local-dir:' + folder, pretrained=True)",
}
_CODE = """
import resource, sys, time
import swin_hf.checkpoints, swin_hf.hub, timm, transformers
folder = sys.argv[1]
transformers.SwinForImageClassification  # which is imported when it is named
start = time.perf_counter()
model = {load}
seconds = time.perf_counter() - start
sum(float(weight.detach().sum()) for weight in model.parameters())  # what is mapped only is read at last
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measure_loading(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of loading a Swin-B that another library saved, there and here, each in new processes."""
    import timm

    sizes: dict[str, Any] = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
    config = transformers.SwinConfig(**sizes, num_labels=1000)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        transformers.SwinForImageClassification(config).save_pretrained(Path(folder, "transformers"))
        theirs = timm.create_model("swin_base_patch4_window7_224")
        timm.models.save_for_hf(theirs, Path(folder, "timm"), safe_serialization=True)
        for library, load in LOADS.items():
            found: dict[str, list[tuple[float, int]]] = {"theirs": [], "ours": []}
            for _ in range(3):
                for side, code in (("theirs", load), ("ours", _OURS)):
                    command = [sys.executable, "-c", _CODE.format(load=code), str(Path(folder, library))]
                    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
                    found[side].append((float(printed[-2]), int(printed[-1])))
            row: dict[str, Any] = {"name": f"swin_base of {library}"}
            for column, place in (("s", 0), ("MiB", 1)):
                best = {side: min(pair[place] for pair in pairs) for side, pairs in found.items()}
                row |= {f"{side}_{column}": round(value / (1024 if place else 1), 3) for side, value in best.items()}
                row[f"{column}_ratio"] = round(best["ours"] / best["theirs"], 2)
            rows.append(row)
    return {"rows": rows, "left_out": {}}


def _classifier() -> nn.Module:
    return transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=1000))


def _upernet() -> nn.Module:
    backbone = transformers.SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.UperNetConfig(backbone_config=backbone, auxiliary_in_channels=384)
    return transformers.UperNetForSemanticSegmentation(config)


def _mask2former() -> nn.Module:
    return transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig())


def _dpt() -> nn.Module:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.Swinv2Config(image_size=256, window_size=16, out_features=stages)
    sizes = {"neck_hidden_sizes": [96, 192, 384, 768], "reassemble_factors": [1, 1, 1, 1]}
    return transformers.DPTForDepthEstimation(transformers.DPTConfig(backbone_config=backbone, **sizes))


HOSTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "SwinForImageClassification, swin_tiny": (_classifier, 224),
    "UperNet, swin_tiny": (_upernet, 256),
    "Mask2Former, swin_tiny": (_mask2former, 256),
    "DPT, swinv2_tiny": (_dpt, 256),
}


@torch.inference_mode()
def measure_replace(setting: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of an image through models of transformers, as they are and on our backbone, and the difference.

    Mask2Former cuts its masks at 0.5 between layers. A rounding that moves a pixel across is 4e-3 in its last outputs,
    as it is between transformers' own fp32 and fp64; up to the pixel decoder the difference is 6e-7.
    """
    rows = []
    for name, (build, side) in HOSTS.items():
        torch.manual_seed(0)
        theirs = build().eval()
        ours = replace_backbone(copy.deepcopy(theirs))
        pixels = torch.randn(1, 3, side, side)
        pairs = zip(theirs(pixels).to_tuple(), ours(pixels).to_tuple(), strict=True)
        apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs if isinstance(a, torch.Tensor))
        calls = {"theirs": lambda t=theirs, x=pixels: t(x), "ours": lambda o=ours, x=pixels: o(x)}
        times = {side_: min(values) * 1e3 for side_, values in take_turns(calls, "cpu", options.seconds).items()}
        row = {"name": name, "theirs_ms": round(times["theirs"], 1), "ours_ms": round(times["ours"], 1)}
        row |= {"ours_is_faster_by": round(times["theirs"] / times["ours"], 2), "largest_difference": f"{apart:.1e}"}
        rows.append(row)
    return {"rows": rows, "left_out": {}}
