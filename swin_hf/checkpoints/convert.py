"""From one of our models to a checkpoint of any layout, and from layout to layout on disk."""

import logging
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from swin_hf.checkpoints.conventions import differences
from swin_hf.checkpoints.load import MODELS, Checkpoint, build_model, class_for
from swin_hf.checkpoints.preprocessing import processor_values
from swin_hf.checkpoints.read import CONFIG_NAME, PREPROCESSOR_NAME
from swin_hf.checkpoints.tables import LAYOUTS, Kind, Layout, Windows
from swin_hf.checkpoints.tables_swinv2 import LAYOUTS_V2
from swin_hf.checkpoints.translate import Place, to_theirs
from swin_hf.checkpoints.write import check_destination, write_files
from swin_hf.classes import class_table
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.configuration_swinv2_hf import SwinV2HFConfig
from swin_hf.model.modeling_swin_hf import SwinHFPreTrainedModel
from swin_hf.processing import Preprocessing

logger = logging.getLogger(__name__)


def export_checkpoint(model: SwinHFPreTrainedModel, layout: str) -> dict[str, Tensor]:
    """The weights of a model in the names of a layout, for its own code to load strictly; nothing is shared.

    Args:
        model: Any model of this package; its class decides which keys there are.
        layout: A name out of ``swin_hf.checkpoints.LAYOUTS``.

    Raises:
        ValueError: If there is no such layout, or it cannot express the model; the message says what it lacks.
    """
    place = _place_of(model, layout)
    if objections := objections_to(model.config, place.layout, place.kind):
        raise ValueError(f"the {layout} layout cannot hold this model: {'; '.join(objections)}")
    for difference in differences(model.config, place.layout):
        logger.warning("the code of the %s layout will compute something else: %s", layout, difference)
    prefix = "" if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
    state = {prefix + name: tensor.detach() for name, tensor in model.state_dict().items()}
    return to_theirs(state, place, model.config)


def _place_of(model: SwinHFPreTrainedModel, layout: str) -> Place:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    kinds = [kind for kind, model_class in MODELS.items() if isinstance(model, model_class)]
    if not kinds:
        names = ", ".join(model_class.__name__ for model_class in MODELS.values())
        raise ValueError(
            f"{type(model).__name__} is not a model of this package ({names}); load it with load_checkpoint"
        )
    layouts = LAYOUTS_V2 if model.config.cosine_attention else LAYOUTS
    if layout not in layouts:
        raise ValueError(f"the {layout} layout has no Swin Transformer V2; choose one of {', '.join(layouts)}")
    chosen = layouts[layout]
    if kinds[0] not in chosen.trunks:
        held = ", ".join(kind.value for kind in chosen.trunks)
        raise ValueError(
            f"the {layout} layout has no {kinds[0].value}, only: {held}; load the checkpoint as one of these first "
            "(load_checkpoint(..., model_class=...))"
        )
    return Place(chosen, kinds[0], model.config.depths, "", chosen.trunks[kinds[0]][0])


def objections_to(config: SwinHFConfig, layout: Layout, kind: Kind) -> list[str]:
    """What the code of a layout cannot build, with the remedy; empty if it can build the model."""
    windows, objections = config.stage_windows, []
    shapes = ", ".join(f"{height}x{width}" for height, width in windows)
    is_square = all(height == width for height, width in windows)
    is_one = len(set(windows)) == 1
    # Microsoft's code has one window, and cuts it to the map where that is smaller.
    largest, maps = max(windows)[0], [min(config.grid_hw) // 2**stage for stage in range(len(windows))]
    is_cut = all(window[0] in (largest, min(largest, side)) for window, side in zip(windows, maps, strict=True))
    can_build = {
        Windows.ANY: True,
        Windows.ONE: is_one,
        Windows.ONE_SQUARE: is_one and is_square,
        Windows.SQUARE: is_square and is_cut,
    }
    if not can_build[layout.windows]:
        objections.append(
            f"it has {layout.windows.value}, the model {shapes}; model.set_input_size(window_size=...) resamples them"
        )
    units = config.bias_units if isinstance(config, SwinV2HFConfig) else windows
    if layout.name == "torchvision" and units != windows:
        words = ", ".join(f"{height}x{width}" for height, width in units)
        objections.append(f"it divides offsets by the window, {shapes}, and the model by {words}")
    if layout.name.startswith("transformers") and layout.family == "swinv2_hf":
        if any(height != width for height, width in units):
            objections.append("it has square pretrained windows")
        if kind is Kind.BACKBONE and config.norm_features:
            objections.append("its backbone has no norms for its maps; the model has (norm_features)")
    if layout.name == "maskformer-swin" and config.out_features != config.stage_names[1:]:
        objections.append(f"it has a norm for every stage, the model has {config.out_features}; ask for all")
    return objections


def write_checkpoint(checkpoint: Checkpoint, destination: Path, to: str, overwrite: bool = False) -> list[Path]:
    """Write an opened checkpoint in a layout, see :func:`swin_hf.convert_checkpoint`; returns every file written."""
    weights = check_destination(destination, to, overwrite)
    logger.info("%s", checkpoint)
    model = build_model(checkpoint, class_for(checkpoint.place))
    place, config = _place_of(model, to), model.config
    layout = place.layout
    values = processor_values(checkpoint, config)
    if values is None:
        logger.warning(
            "no preprocessor_config.json is written: how images of %d channels were normalised is not known",
            config.num_channels,
        )
    preprocessing = Preprocessing.from_values(values or {})
    if preprocessing and layout.name.startswith(("transformers", "maskformer", "timm")):
        values = preprocessing.stock_values()  # ours is for a configuration of ours
    texts = {CONFIG_NAME: describe(model, place, preprocessing), PREPROCESSOR_NAME: values}
    state = export_checkpoint(model, layout.name)
    files = write_files(destination, weights, state, layout, texts, class_table(config.id2label))
    logger.info("written in the %s layout: %s", to, ", ".join(map(str, files)))
    return files


def describe(model: SwinHFPreTrainedModel, place: Place, preprocessing: Preprocessing | None) -> dict[str, Any]:
    """``config.json`` for a layout: transformers' for its own, timm's for timm, ours for all others."""
    layout, kind = place.layout, place.kind
    if layout.name == "timm":
        return _describe_for_timm(model.config, kind, preprocessing)
    if layout.name == "maskformer-swin":
        config_class: Any = transformers.MaskFormerSwinConfig
        architecture = "MaskFormerSwinBackbone"
    elif layout.name.startswith("transformers"):
        suffixes = {Kind.CLASSIFIER: "ForImageClassification", Kind.MIM: "ForMaskedImageModeling"}
        suffix = {**suffixes, Kind.BASE: "Model", Kind.BACKBONE: "Backbone"}[kind]
        is_v2 = layout.family == "swinv2_hf"
        config_class = transformers.Swinv2Config if is_v2 else transformers.SwinConfig
        architecture = f"Swin{'v2' * is_v2}{suffix}"
    else:
        return {**model.config.to_dict(), "architectures": [type(model).__name__]}
    values = config_class(**transformers_fields(model.config, config_class)).to_dict()
    return {**values, "architectures": [architecture]}


def transformers_fields(config: SwinHFConfig, config_class: Any) -> dict[str, Any]:
    """Fields of one of transformers' own Swin configurations for the same network."""
    derived = {"model_type", "num_layers", "hidden_size", "stage_names", "architectures", "transformers_version"}
    known = {*config_class().to_dict(), "id2label", "label2id", "problem_type"} - derived
    values = {name: value for name, value in config.to_dict().items() if name in known}
    return {**values, "window_size": config.stage_windows[0][0]}


def timm_arguments(config: SwinHFConfig) -> dict[str, Any]:
    """Arguments of timm's classes for the same network."""
    v2 = {"pretrained_window_sizes": config.pretrained_window_sizes} if isinstance(config, SwinV2HFConfig) else {}
    return {
        "img_size": list(config.image_hw),
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": config.embed_dim,
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": [list(window) for window in config.stage_windows],
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        **v2,
    }


def _describe_for_timm(config: SwinHFConfig, kind: Kind, preprocessing: Preprocessing | None) -> dict[str, Any]:
    """What timm's factory reads from a folder; the arguments say everything, the architecture is a name of its own."""
    preprocessing = preprocessing or Preprocessing.of_release(config.image_hw, config.num_channels)
    names = class_table(config.id2label) if kind is Kind.CLASSIFIER else []
    return {
        "architecture": "swinv2_tiny_window8_256" if config.cosine_attention else "swin_tiny_patch4_window7_224",
        "num_classes": len(names),
        "num_features": config.hidden_size,
        "label_names": names,
        "model_args": timm_arguments(config),
        "pretrained_cfg": {
            "input_size": [config.num_channels, *config.image_hw],
            "num_classes": len(names),
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": "squash" if preprocessing.short_side is None else "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        },
    }
