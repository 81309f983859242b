"""The same network of each library, with the same weights, and how far their results are apart."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from swin_hf import SwinHFConfig, SwinHFForImageClassification, export_checkpoint

PEERS = ("swin_hf", "transformers", "timm", "torchvision")


def build_ours(preset: str) -> SwinHFForImageClassification:
    """Our model with random weights and 1000 classes, without stochastic depth, which would hide what is compared."""
    config = SwinHFConfig.from_preset(preset, num_labels=1000, drop_path_rate=0.0)
    config._attn_implementation = "auto"
    return sharpen(SwinHFForImageClassification(config))


@torch.no_grad()
def sharpen(model: nn.Module) -> Any:
    """Make attention peaked and biased as in a trained model; at its start it is nearly equal everywhere."""
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.normal_()
        elif name.endswith("qkv.weight"):
            parameter.mul_(3)
    return model


def build_peer(name: str, preset: str, ours: SwinHFForImageClassification) -> nn.Module:
    """The same network of another library, with our weights.

    Raises:
        ImportError: If the library is not installed; the message says how to install it.
        ValueError: If the library has no such network.
    """
    config = ours.config
    state = export_checkpoint(ours, name)
    if name == "transformers":
        from transformers import SwinConfig, SwinForImageClassification

        sizes = ("patch_size", "num_channels", "embed_dim", "mlp_ratio", "qkv_bias", "layer_norm_eps", "drop_path_rate")
        theirs = SwinConfig(
            image_size=config.image_hw[0],
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            window_size=config.stage_windows[0][0],
            num_labels=config.num_labels,
            **{size: getattr(config, size) for size in sizes},
        )
        with tempfile.TemporaryDirectory() as folder:  # the names in its files are not those of its modules
            theirs.save_pretrained(folder)
            save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            return SwinForImageClassification.from_pretrained(folder, attn_implementation="sdpa")
    elif name == "timm":
        try:
            import timm
        except ImportError as error:
            raise ImportError("timm is not installed; pip install 'swin-hf[bench]' adds it") from error
        model = timm.create_model(preset, pretrained=False, num_classes=config.num_labels, drop_path_rate=0.0)
    else:
        from torchvision.models.swin_transformer import SwinTransformer

        model = SwinTransformer(
            patch_size=list(config.patch_hw),
            embed_dim=config.embed_dim,
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            window_size=list(config.stage_windows[0]),
            mlp_ratio=config.mlp_ratio,
            stochastic_depth_prob=0.0,
            num_classes=config.num_labels,
        )
    model.load_state_dict(state)
    return model


def logits_of(output: Any) -> Tensor:
    """Logits ``(B, classes)`` of whatever a library returns."""
    return output if isinstance(output, Tensor) else output.logits


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """What a training step left behind, in a form that every library has: its names and layouts differ."""
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {
        "bias tables": torch.cat([g.flatten() for name, g in gradients.items() if "position_bias_table" in name]),
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
