"""Compute with what was written: our own reader, and the code that the layout belongs to where it is installed."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_hf.checkpoints.convert import export_checkpoint, transformers_fields
from swin_hf.checkpoints.load import Checkpoint, load_checkpoint
from swin_hf.checkpoints.read import read_source
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.modeling_swin_hf import SwinHFForImageClassification, SwinHFPreTrainedModel

# fp32: another order of summation moves logits of unit scale by less than this.
TOLERANCE = 1e-4


def build_peer(layout: str, config: SwinHFConfig) -> Any:
    """The classifier that the layout's own library builds for these sizes, with random weights.

    Args:
        layout: ``timm``, ``torchvision`` or ``transformers-memory``.
        config: Sizes.

    Returns:
        The model in evaluation mode, or None where no library of that layout is installed.
    """
    if layout == "timm" and importlib.util.find_spec("timm"):
        from timm.models.swin_transformer import SwinTransformer as TimmSwin

        build: Any = TimmSwin  # its annotations know squares only
        return build(
            img_size=config.image_hw,
            patch_size=config.patch_hw,
            in_chans=config.num_channels,
            num_classes=config.num_labels,
            embed_dim=config.embed_dim,
            depths=tuple(config.depths),
            num_heads=tuple(config.num_heads),
            window_size=[list(window) for window in config.stage_windows],
            mlp_ratio=config.mlp_ratio,
            qkv_bias=config.qkv_bias,
            drop_path_rate=config.drop_path_rate,
        ).eval()
    if layout == "torchvision" and config.num_channels == 3:
        from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

        return TorchvisionSwin(
            patch_size=list(config.patch_hw),
            embed_dim=config.embed_dim,
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            window_size=list(config.stage_windows[0]),
            mlp_ratio=config.mlp_ratio,
            stochastic_depth_prob=config.drop_path_rate,
            num_classes=config.num_labels,
        ).eval()
    if layout == "transformers-memory":
        from transformers import SwinConfig, SwinForImageClassification

        return SwinForImageClassification(SwinConfig(**transformers_fields(config, SwinConfig))).eval()
    return None


def verify(
    model: SwinHFPreTrainedModel, written: str | os.PathLike[str], layout: str, pixel_values: Tensor
) -> dict[str, float]:
    """Compare what was written with the model that it was written from.

    Args:
        model: The source, in evaluation mode.
        written: File or folder in the layout.
        layout: The layout.
        pixel_values: Preprocessed images, ``(B, channels, height, width)``.

    Returns:
        Largest absolute difference of the outputs, for our reader and for each other library that could be asked.

    Raises:
        RuntimeError: If the library of the layout refuses the weights.
    """
    with torch.inference_mode():
        expected = output_of(model, pixel_values)
        again = load_checkpoint(written, layout, model_class=type(model))
        differences = {"swin_hf": _distance(expected, output_of(again, pixel_values))}
        if isinstance(model, SwinHFForImageClassification):
            for name, peer in _peers(again, written, layout):
                differences[name] = _distance(expected, peer(pixel_values))
    return differences


def verify_source(checkpoint: Checkpoint, model: SwinHFPreTrainedModel, pixel_values: Tensor) -> dict[str, float]:
    """Compare a model with what the library of its source computes from the weights as they were read.

    Returns:
        Largest absolute difference of the logits; empty where that library is not installed, builds no such model, or
        the weights were resampled.
    """
    layout, config = checkpoint.place.layout.name, checkpoint.config
    is_resampled = (checkpoint.target.image_hw, checkpoint.target.stage_windows) != (
        config.image_hw,
        config.stage_windows,
    )
    if is_resampled or not isinstance(model, SwinHFForImageClassification):
        return {}
    name = "transformers-memory" if layout.startswith("transformers") else layout
    peer = build_peer(name, config)
    if peer is None:
        return {}
    state = checkpoint.source.state if name == layout else export_checkpoint(model, name)
    try:
        peer.load_state_dict(state, strict=True)
    except RuntimeError:  # prefixes and neighbours in the file, which our reader took off
        peer.load_state_dict(export_checkpoint(model, name), strict=True)
    with torch.inference_mode():
        theirs = peer(pixel_values)
        theirs = getattr(theirs, "logits", theirs)
        return {f"the source's library, {layout}": _distance(output_of(model, pixel_values), theirs)}


def _peers(
    model: SwinHFForImageClassification, written: str | os.PathLike[str], layout: str
) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Classifiers of other libraries that hold what was written."""
    if layout.startswith("transformers"):
        if layout == "transformers" and Path(written).is_dir():
            from transformers import SwinForImageClassification

            theirs = SwinForImageClassification.from_pretrained(written).eval()
        else:
            theirs = build_peer("transformers-memory", model.config)
            theirs.load_state_dict(export_checkpoint(model, "transformers-memory"), strict=True)
        return [("transformers", lambda images: theirs(images).logits)]
    peer = build_peer(layout, model.config)
    if peer is None:
        return []
    peer.load_state_dict(read_source(written).state, strict=True)
    return [(layout, peer)]


def output_of(model: Any, pixel_values: Tensor) -> Any:
    """What a model of any kind computes last: logits, tokens, pixels or the coarsest feature map."""
    output = model(pixel_values.to(model.dtype))
    for name in ("logits", "reconstruction", "feature_maps", "last_hidden_state"):
        value = getattr(output, name, None)
        if value is not None:
            return value[-1] if isinstance(value, tuple) else value
    raise TypeError(f"{type(output).__name__} is no output of this package")


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())
