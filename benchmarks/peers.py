"""The same network of each library, with the same weights, and how far their results are apart."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_hf import SwinHFForImageClassification, export_checkpoint
from swin_hf.checkpoints import verify
from swin_hf.families import config_of_preset, family_of
from swin_hf.model.modeling_swinv2_hf import SwinV2HFBranchNorm

PEERS = ("swin_hf", "transformers", "timm", "torchvision")
BIAS = ("position_bias_table", "position_bias_mlp", "cpb_mlp")  # in the names of what learns the bias


def build_ours(preset: str) -> SwinHFForImageClassification:
    """Our model with random weights and 1000 classes, without stochastic depth, which would hide what is compared."""
    config = config_of_preset(preset, num_labels=1000, drop_path_rate=0.0)
    config._attn_implementation = "auto"
    return sharpen(family_of(config).model_class("image-classification")(config))


@torch.no_grad()
def sharpen(model: nn.Module) -> Any:
    """Make attention peaked and biased as in a trained model; at its start it is nearly equal everywhere.

    Blocks of V2 start as the identity: here they do not.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.normal_()
        elif name.endswith("qkv.weight"):
            parameter.mul_(3)
        elif name.endswith("cpb_mlp.2.weight"):
            parameter.normal_(std=0.2)
    for module in model.modules():
        if isinstance(module, SwinV2HFBranchNorm):
            module.weight.fill_(1.0)
    return model


def build_peer(name: str, ours: SwinHFForImageClassification) -> nn.Module:
    """The same network of another library, with our weights.

    Raises:
        ImportError: If the library is not installed; the message says how to install it.
    """
    layout = verify.IN_MEMORY[ours.config.cosine_attention] if name == "transformers" else name
    model = verify.build_peer(layout, ours.config)
    if model is None:
        raise ImportError(f"{name} is not installed; pip install 'swin-hf[bench]' adds it")
    model.load_state_dict(export_checkpoint(ours, layout))
    return model


def logits_of(output: Any) -> Tensor:
    """Logits ``(B, classes)`` of whatever a library returns."""
    return output if isinstance(output, Tensor) else output.logits


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """What a training step left behind, in a form that every library has: its names and layouts differ."""
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {
        "bias": torch.cat([g.flatten() for name, g in gradients.items() if any(part in name for part in BIAS)]),
        "patches": next(g for g in gradients.values() if g.ndim == 4),  # the first layer: everything is behind it
        "all": torch.stack([g.norm() for g in gradients.values()]).norm(),
    }


def true_gradients(definition: nn.Module, device: str, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradients of a training step, by the definition in fp32, a few images at a time."""
    definition.to(device).train()
    for part, wanted in zip(images.split(8), labels.split(8), strict=True):
        loss = F.cross_entropy(logits_of(definition(part.to(device))), wanted.to(device), reduction="sum")
        (loss / len(images)).backward()
    return gradients_of(definition)


def disagreement(output: Tensor, reference: Tensor) -> float:
    """Norm of the difference in units of the reference's norm."""
    return ((output.float().cpu() - reference).norm() / reference.norm()).item()
