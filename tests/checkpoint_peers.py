"""Tiny networks of other libraries with random weights, and state dicts in the layouts that no library here builds.

The latter are laid out from public facts, without the code under test: timm's weights under Microsoft's names, with
buffers computed as Microsoft's code computes them; and those again under OpenMMLab's names, as its own converter
(tools/model_converters/swin2mmseg.py) writes them.
"""

import contextlib
import functools
import io
import math
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

SQUARE = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2, 2],
    "num_heads": [2, 2, 4],
    "window_size": 4,
    "num_labels": 5,
    "encoder_stride": 8,
}
# The last map has 4x6 tokens: its window covers one axis, so that the two rules for dropping the shift differ.
RECTANGLE = {**SQUARE, "image_size": (32, 48), "window_size": (4, 3)}
CLASSES = SQUARE["num_labels"]


class Peer(NamedTuple):
    module: nn.Module | None  # None where no library of the layout is installed
    state: dict[str, Tensor]


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make every parameter matter: no zeros, no ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = 0.3 if parameter.ndim > 1 else 0.1
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale + offset
    return module.eval()


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def saved(module: Any) -> dict[str, Tensor]:
    """What ``save_pretrained`` of transformers writes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        module.save_pretrained(folder)
        return safetensors.torch.load_file(Path(folder) / "model.safetensors")


@functools.cache
def timm_swin(rectangle: bool = False) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    sizes = RECTANGLE if rectangle else SQUARE
    return randomise(
        SwinTransformer(
            img_size=sizes["image_size"],
            patch_size=2,
            num_classes=CLASSES,
            embed_dim=8,
            depths=(2, 2, 2),
            num_heads=(2, 2, 4),
            window_size=sizes["window_size"],
        )
    )


@functools.cache
def torchvision_swin(rectangle: bool = False) -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    window = RECTANGLE["window_size"] if rectangle else (4, 4)
    return randomise(
        SwinTransformer(
            patch_size=[2, 2],
            embed_dim=8,
            depths=[2, 2, 2],
            num_heads=[2, 2, 4],
            window_size=list(window),
            num_classes=CLASSES,
        )
    )


@functools.cache
def transformers_swin(name: str) -> Any:
    import transformers

    stages = {"out_features": ["stage1", "stage2", "stage3"]} if name == "SwinBackbone" else {}
    return randomise(getattr(transformers, name)(transformers.SwinConfig(**SQUARE, **stages)))


@functools.cache
def maskformer_swin() -> Any:
    from transformers.models.maskformer.configuration_maskformer_swin import MaskFormerSwinConfig
    from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinBackbone

    sizes = {name: value for name, value in SQUARE.items() if name not in ("num_labels", "encoder_stride")}
    return randomise(MaskFormerSwinBackbone(MaskFormerSwinConfig(**sizes, out_features=["stage1", "stage2", "stage3"])))


def microsoft_index(window: int) -> Tensor:
    """``relative_position_index`` as models/swin_transformer.py of Microsoft builds it, (N, N)."""
    coordinates = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    relative = (coordinates[:, :, None] - coordinates[:, None, :]).permute(1, 2, 0).contiguous()
    relative += window - 1
    relative[:, :, 0] *= 2 * window - 1
    return relative.sum(-1)


def microsoft_mask(side: int, window: int) -> Tensor:
    """``attn_mask`` of a shifted block as Microsoft's code builds it, by slices, (nW, N, N)."""
    shift = window // 2
    regions, count = torch.zeros(1, side, side, 1), 0
    slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for rows in slices:
        for columns in slices:
            regions[:, rows, columns, :] = count
            count += 1
    tiles = side // window
    windows = regions.view(1, tiles, window, tiles, window, 1).permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window)
    mask = windows.unsqueeze(1) - windows.unsqueeze(2)
    return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)


def under_microsoft_names(state: dict[str, Tensor], buffers: bool = True) -> dict[str, Tensor]:
    """timm's state dict as Microsoft's: merging at the end of a stage, ``head``, persistent buffers."""
    moved = {}
    for key, tensor in state.items():
        key = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        moved[key.replace("head.fc.", "head.")] = tensor
    if buffers:
        for key in [key for key in moved if key.endswith("relative_position_bias_table")]:
            moved[key.replace("bias_table", "index")] = microsoft_index(4)
        for stage, side in ((0, 16), (1, 8)):  # the third map is one window: no shift, no mask
            moved[f"layers.{stage}.blocks.1.attn_mask"] = microsoft_mask(side, 4)
    return moved


def simmim(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Microsoft's state dict as models/simmim.py saves it."""
    generator = torch.Generator().manual_seed(2)
    encoder = {f"encoder.{key}": tensor for key, tensor in state.items() if not key.startswith("head.")}
    return {
        **encoder,
        "encoder.mask_token": torch.randn(1, 1, 8, generator=generator),
        "decoder.0.weight": torch.randn(8 * 8 * 3, 32, 1, 1, generator=generator),
        "decoder.0.bias": torch.randn(8 * 8 * 3, generator=generator),
    }


def detector(state: dict[str, Tensor], final: str = "norm.") -> dict[str, Tensor]:
    """A classifier's state dict as a detection fork saves it: norms of stages, the rest of a detector around it."""
    backbone = {
        f"backbone.{key}": tensor
        for key, tensor in state.items()
        if not key.startswith(("head.", final)) and not key.endswith("attn_mask")
    }
    for stage, channels in enumerate((8, 16, 32)):
        backbone[f"backbone.norm{stage}.weight"] = torch.full((channels,), 1.5)
        backbone[f"backbone.norm{stage}.bias"] = torch.full((channels,), 0.5)
    return backbone


REST_OF_A_DETECTOR = {"neck.lateral_convs.0.conv.weight": torch.zeros(4, 8, 1, 1), "bbox_head.fc.bias": torch.zeros(3)}


def under_openmmlab_names(microsoft: dict[str, Tensor], v2: bool = False) -> dict[str, Tensor]:
    """Microsoft's state dict as mmpretrain's: other names, merging in the order of ``nn.Unfold``.

    Merging of V2 opens the next stage, and its norm of 2C channels is in plain order.
    """

    def unfold_order(x: Tensor) -> Tensor:
        taps = x.reshape(*x.shape[:-1], 4, x.shape[-1] // 4)[..., [0, 2, 1, 3], :]
        return taps.transpose(-1, -2).reshape(x.shape)

    renamed = {}
    for key, tensor in microsoft.items():
        if key.endswith("attn_mask"):
            continue
        if "downsample" in key and not (v2 and "norm" in key):
            tensor = unfold_order(tensor)
        if key.endswith("relative_position_index"):
            tensor = openmmlab_index(math.isqrt(tensor.shape[0]))
        if v2:
            key = re.sub(r"layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", key)
        for old, new in (
            ("layers.", "stages."),
            ("attn.", "attn.w_msa."),
            ("mlp.fc1.", "ffn.layers.0.0."),
            ("mlp.fc2.", "ffn.layers.1."),
            ("patch_embed.proj.", "patch_embed.projection."),
        ):
            key = key.replace(old, new, 1)
        is_head = key.startswith("head.")
        key = key.replace("head.", "head.fc.") if is_head else re.sub(r"^norm\.", "norm2.", key)  # three stages
        renamed[key if is_head else f"backbone.{key}"] = tensor
    return renamed


def openmmlab_index(window: int) -> Tensor:
    """``relative_position_index`` as WindowMSA of OpenMMLab builds it, by two arithmetic sequences."""
    rows = torch.arange(0, (2 * window - 1) * window, 2 * window - 1)
    sequence = (rows[:, None] + torch.arange(window)[None, :]).reshape(1, -1)
    return (sequence + sequence.T).flip(1).contiguous()


@functools.cache
def peer(name: str) -> Peer:
    """A network or state dict by name; the first word is the layout."""
    timm_state = timm_swin().state_dict()
    microsoft = under_microsoft_names(timm_state)
    if name == "timm":
        return Peer(timm_swin(), timm_state)
    if name == "timm rectangle":
        return Peer(timm_swin(True), timm_swin(True).state_dict())
    if name == "torchvision":
        return Peer(torchvision_swin(), torchvision_swin().state_dict())
    if name == "torchvision rectangle":
        return Peer(torchvision_swin(True), torchvision_swin(True).state_dict())
    if name == "microsoft":
        return Peer(timm_swin(), microsoft)
    if name == "timm-old":
        return Peer(timm_swin(), under_microsoft_names(timm_state, buffers=False))
    if name == "microsoft simmim":
        return Peer(None, simmim(microsoft))
    if name == "microsoft detector":
        return Peer(None, detector(microsoft))
    if name == "openmmlab":
        return Peer(timm_swin(), under_openmmlab_names(microsoft))
    if name == "openmmlab detector":
        return Peer(None, detector(_without("backbone.", under_openmmlab_names(microsoft)), final="norm2."))
    if name == "maskformer-swin":
        return Peer(maskformer_swin(), maskformer_swin().state_dict())
    layout, _, head = name.partition(" ")
    module = transformers_swin(f"Swin{head}")
    if layout == "transformers-memory":
        return Peer(module, module.state_dict())
    if layout == "transformers-4":
        state = saved(module)
        state.pop("swin.layernorm.weight" if head == "Backbone" else "", None)
        state.pop("swin.layernorm.bias" if head == "Backbone" else "", None)
        tables = [key for key in state if key.endswith("relative_position_bias_table")]
        state.update({key.replace("bias_table", "index"): microsoft_index(4) for key in tables})
        return Peer(module, state)
    return Peer(module, saved(module))


def _without(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if not key.startswith("head.")}


CLASSIFIERS = (
    "timm",
    "torchvision",
    "microsoft",
    "timm-old",
    "openmmlab",
    "transformers ForImageClassification",
    "transformers-4 ForImageClassification",
    "transformers-memory ForImageClassification",
)
BACKBONES = (
    "microsoft detector",
    "openmmlab detector",
    "maskformer-swin",
    "transformers Backbone",
    "transformers-4 Backbone",
    "transformers-memory Backbone",
)
OTHERS = (
    "microsoft simmim",
    "transformers ForMaskedImageModeling",
    "transformers-4 ForMaskedImageModeling",
    "transformers-memory ForMaskedImageModeling",
    "transformers Model",
    "transformers-4 Model",
    "transformers-memory Model",
)
EVERY_PEER = (*CLASSIFIERS, "timm rectangle", "torchvision rectangle", *BACKBONES, *OTHERS)
