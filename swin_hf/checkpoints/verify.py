"""Compute with what was written: our own reader, and the code that the layout belongs to where it is installed."""

import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageClassification

from swin_hf.checkpoints.convert import export_checkpoint, timm_arguments, transformers_fields
from swin_hf.checkpoints.load import Checkpoint, build_model, open_checkpoint
from swin_hf.checkpoints.read import read_source
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.modeling_swin_hf import SwinHFForImageClassification, SwinHFPreTrainedModel

# fp32: another order of summation moves logits of unit scale by less than this.
TOLERANCE = 1e-4
# The names that transformers has in memory: of V1, and of V2, where they are those on disk.
IN_MEMORY = ("transformers-memory", "transformers")


def build_peer(layout: str, config: SwinHFConfig) -> Any:
    """The classifier that ``timm``, ``torchvision`` or transformers (:data:`IN_MEMORY`) builds for these sizes.

    Its weights are random, and it is in evaluation mode; None where no library of that layout is installed.
    """
    if layout == "timm" and importlib.util.find_spec("timm"):
        from timm.models import swin_transformer, swin_transformer_v2

        v1, v2 = swin_transformer.SwinTransformer, swin_transformer_v2.SwinTransformerV2
        build: Any = v2 if config.cosine_attention else v1  # its annotations know squares only
        options = {"num_classes": config.num_labels, "drop_path_rate": config.drop_path_rate}
        return build(**timm_arguments(config), **options).eval()
    if layout == "torchvision" and config.num_channels == 3:
        from torchvision.models import swin_transformer as theirs

        parts = {"block": theirs.SwinTransformerBlockV2, "downsample_layer": theirs.PatchMergingV2}
        return theirs.SwinTransformer(
            patch_size=list(config.patch_hw),
            embed_dim=config.embed_dim,
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            window_size=list(config.stage_windows[0]),
            mlp_ratio=config.mlp_ratio,
            stochastic_depth_prob=config.drop_path_rate,
            num_classes=config.num_labels,
            **(parts if config.cosine_attention else {}),
        ).eval()
    if layout == IN_MEMORY[config.cosine_attention]:
        config_class = transformers.Swinv2Config if config.cosine_attention else transformers.SwinConfig
        their_config = config_class(**transformers_fields(config, config_class))
        return AutoModelForImageClassification.from_config(their_config).eval()
    return None


def verify(
    model: SwinHFPreTrainedModel, written: str | os.PathLike[str], layout: str, pixel_values: Tensor
) -> dict[str, float]:
    """Compare what was written in a layout with the model that it was written from, on images ``(B, C, H, W)``.

    Returns the largest absolute difference of the outputs, for our reader and for the layout's library if it is there.
    """
    with torch.inference_mode():
        expected = output_of(model, pixel_values)
        again = build_model(open_checkpoint(written, layout), type(model))
        differences = {"swin_hf": _distance(output_of(again, pixel_values), expected)}
        if not isinstance(model, SwinHFForImageClassification):
            return differences
        if layout == "transformers" and Path(written).is_dir():
            peer: Any = AutoModelForImageClassification.from_pretrained(written).eval()
        else:
            peer = _library(layout, again, read_source(written).state)
        if peer is not None:
            name = "transformers" if layout.startswith("transformers") else layout
            differences[name] = _distance_of(peer, pixel_values, expected)
    return differences


def verify_source(checkpoint: Checkpoint, model: SwinHFPreTrainedModel, pixel_values: Tensor) -> dict[str, float]:
    """Compare a model with what the library of its source computes from the weights as they were read.

    Returns the largest absolute difference of the logits; nothing without that library, or for resampled weights.
    """
    layout, found, target = checkpoint.place.layout.name, checkpoint.config, checkpoint.target
    is_resampled = (target.image_hw, target.stage_windows) != (found.image_hw, found.stage_windows)
    if is_resampled or not isinstance(model, SwinHFForImageClassification):
        return {}
    try:
        peer = _library(layout, model, checkpoint.source.state)
    except RuntimeError:  # of keys that our reader left out or renamed
        peer = _library(layout, model, export_checkpoint(model, layout))
    if peer is None:
        return {}
    with torch.inference_mode():
        expected = output_of(model, pixel_values)
        return {f"the source's library, {layout}": _distance_of(peer, pixel_values, expected)}


def _library(layout: str, model: SwinHFForImageClassification, state: Mapping[str, Tensor]) -> Any:
    """The classifier of the library of a layout with these weights of it, which are our model's; None without one."""
    name = IN_MEMORY[model.config.cosine_attention] if layout.startswith("transformers") else layout
    peer = build_peer(name, model.config)
    if peer is not None:
        peer.load_state_dict(state if name == layout else export_checkpoint(model, name), strict=True)
    return peer


def output_of(model: Any, pixel_values: Tensor) -> Any:
    """What a model of any kind computes last: logits, tokens, pixels or the coarsest feature map."""
    output = model(pixel_values.to(model.dtype))
    for name in ("logits", "reconstruction", "feature_maps", "last_hidden_state"):
        value = getattr(output, name, None)
        if value is not None:
            return value[-1] if isinstance(value, tuple) else value
    raise TypeError(f"{type(output).__name__} is not an output of this package")


def _distance_of(peer: Any, pixel_values: Tensor, expected: Tensor) -> float:
    """Largest difference of another library's logits; infinite where its forward pass fails, as on a small map."""
    try:
        output = peer(pixel_values)
    except (AssertionError, RuntimeError):
        return math.inf
    return _distance(getattr(output, "logits", output), expected)  # only transformers wraps them


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max())
