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
from swin_hf.model.configuration_swinv2_hf import SwinV2HFConfig
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
        from timm.models.swin_transformer import SwinTransformer as TimmSwin
        from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2

        v2 = {"pretrained_window_sizes": config.pretrained_window_sizes} if isinstance(config, SwinV2HFConfig) else {}
        build: Any = TimmSwinV2 if v2 else TimmSwin  # its annotations know squares only
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
            **v2,
        ).eval()
    if layout == "torchvision" and config.num_channels == 3:
        from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
        from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

        parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if config.cosine_attention else {}
        return TorchvisionSwin(
            patch_size=list(config.patch_hw),
            embed_dim=config.embed_dim,
            depths=list(config.depths),
            num_heads=list(config.num_heads),
            window_size=list(config.stage_windows[0]),
            mlp_ratio=config.mlp_ratio,
            stochastic_depth_prob=config.drop_path_rate,
            num_classes=config.num_labels,
            **parts,
        ).eval()
    if layout == IN_MEMORY[config.cosine_attention]:
        from transformers import SwinConfig, SwinForImageClassification, Swinv2Config, Swinv2ForImageClassification

        if config.cosine_attention:
            return Swinv2ForImageClassification(Swinv2Config(**transformers_fields(config, Swinv2Config))).eval()
        return SwinForImageClassification(SwinConfig(**transformers_fields(config, SwinConfig))).eval()
    return None


def verify(
    model: SwinHFPreTrainedModel, written: str | os.PathLike[str], layout: str, pixel_values: Tensor
) -> dict[str, float]:
    """Compare what was written in a layout with the model that it was written from, on images ``(B, C, H, W)``.

    Returns:
        Largest absolute difference of the outputs, for our reader and for each other library that could be asked;
        one that refuses the weights raises RuntimeError.
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
    name = IN_MEMORY[config.cosine_attention] if layout.startswith("transformers") else layout
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
            from transformers import AutoModelForImageClassification

            theirs = AutoModelForImageClassification.from_pretrained(written).eval()
        else:
            name = IN_MEMORY[model.config.cosine_attention]
            theirs = build_peer(name, model.config)
            theirs.load_state_dict(export_checkpoint(model, name), strict=True)
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
    raise TypeError(f"{type(output).__name__} is not an output of this package")


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())
