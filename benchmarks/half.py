"""Who stays finite in half precision where a map is padded: Swin V2 of each library, with the same weights.

    python -m benchmarks.half

A padded token has a key of zeros. A library that divides it by its length and an epsilon that half precision rounds to
zero has NaN from there on; where the division is done in float32, its gradient overflows in half precision. Each row is
a forward and a backward pass at a size at which every stage is padded.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_hf import SwinV2HFConfig, SwinV2HFForImageClassification

from .peers import PEERS, build_peer, disagreement, logits_of, sharpen

SIDE, WINDOW = 144, 8  # maps of 36, 18 and 9 tokens
WAYS = {
    "fp16": (torch.float16, False),
    "fp16 autocast": (torch.float16, True),
    "bf16": (torch.bfloat16, False),
    "bf16 autocast": (torch.bfloat16, True),
}


def build_ours() -> SwinV2HFForImageClassification:
    """A small classifier whose blocks do something, which all libraries can have."""
    sizes = {"embed_dim": 32, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "num_labels": 10}
    config = SwinV2HFConfig(image_size=SIDE, window_size=WINDOW, drop_path_rate=0.0, **sizes)
    return sharpen(SwinV2HFForImageClassification(config))


def gradients_after(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and what a backward pass leaves behind by name; the loss is computed in float32."""
    logits = logits_of(model(images)).float()
    F.cross_entropy(logits, labels).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return logits.detach(), {name: gradient.float().cpu() for name, gradient in gradients.items()}


def measure(model: nn.Module, dtype: torch.dtype, autocast: bool, device: str = "cpu") -> dict[str, Any]:
    """Numbers that are not finite in outputs and gradients, and how far both are from the model's own float32.

    Args:
        model: A classifier of 10 classes, in float32; it is left as it is.
        dtype: The type of half precision.
        autocast: Whether weights stay in float32 and operations choose; else the whole model is converted.
        device: Where to compute.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, SIDE, SIDE, generator=generator).to(device)
    labels = torch.tensor([1, 7], device=device)
    exact, half = copy.deepcopy(model).to(device).eval(), copy.deepcopy(model).to(device).eval()
    expected, expected_gradients = gradients_after(exact, images, labels)
    if autocast:
        with torch.autocast(device, dtype):
            logits, gradients = gradients_after(half, images, labels)
    else:
        logits, gradients = gradients_after(half.to(dtype), images.to(dtype), labels)
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    both = [torch.cat([some[name].flatten() for name in gradients]) for some in (gradients, expected_gradients)]
    return {
        "bad_outputs": int((~logits.isfinite()).sum()),
        "outputs": logits.numel(),
        "bad_gradients": len(bad),
        "gradients": len(gradients),
        "output_difference": disagreement(logits, expected.cpu()),
        "gradient_difference": disagreement(*both),
    }


def table(device: str = "cpu", peers: tuple[str, ...] = PEERS) -> str:
    """All libraries in all ways, as Markdown; a library that fails is named with what it said."""
    torch.manual_seed(0)
    ours = build_ours()
    lines = [
        "| precision | library | outputs that are not finite | parameters without a finite gradient "
        "| outputs, from fp32 | gradients, from fp32 |",
        "|---|---|---|---|---|---|",
    ]
    for way, (dtype, autocast) in WAYS.items():
        for name in peers:
            try:
                found = measure(ours if name == "swin_hf" else build_peer(name, ours), dtype, autocast, device)
            except Exception as error:  # the others are measured all the same
                lines.append(f"| {way} | {name} | {type(error).__name__}: {str(error).splitlines()[0]} | | | |")
                continue
            lines.append(
                f"| {way} | {name} | {found['bad_outputs']} of {found['outputs']} "
                f"| {found['bad_gradients']} of {found['gradients']} "
                f"| {found['output_difference']:.1e} | {found['gradient_difference']:.1e} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table("cuda" if torch.cuda.is_available() else "cpu"))
