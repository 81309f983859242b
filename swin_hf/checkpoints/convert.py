"""From one of our models to a checkpoint of any layout, and from layout to layout on disk."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor

from swin_hf.checkpoints.load import MODELS, Checkpoint, build_model, class_for
from swin_hf.checkpoints.preprocessing import processor_values
from swin_hf.checkpoints.read import CONFIG_NAME, PREPROCESSOR_NAME
from swin_hf.checkpoints.tables import LAYOUTS, Kind, Layout, Windows
from swin_hf.checkpoints.tables_swinv2 import LAYOUTS_V2
from swin_hf.checkpoints.translate import Place, cut_windows, differences, to_theirs
from swin_hf.classes import class_table
from swin_hf.files import WEIGHT_SUFFIXES, temporary_folder
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.configuration_swinv2_hf import SwinV2HFConfig
from swin_hf.model.modeling_swin_hf import SwinHFPreTrainedModel
from swin_hf.processing import Preprocessing

logger = logging.getLogger(__name__)


def export_checkpoint(model: SwinHFPreTrainedModel, layout: str) -> dict[str, Tensor]:
    """The weights of a model in the names of a layout, for its own code to load strictly; nothing is shared.

    Where a map of ``config.image_size`` is smaller than its window, code that builds a smaller window (Microsoft's and
    timm's classifiers) has a table of that size, so the rows of larger offsets are left out.

    Args:
        model: Any model of this package; its class decides which keys there are.
        layout: A name out of ``swin_hf.checkpoints.LAYOUTS``.

    Raises:
        ValueError: If there is no such layout, or it cannot express the model; the message says what it lacks.
    """
    place = _place_of(model, layout)
    if objections := objections_to(model.config, place.layout, place.kind):
        raise ValueError(f"the {layout} layout cannot hold this model: {'; '.join(objections)}")
    for difference in differences(model.config, place):
        logger.warning("the code of the %s layout will compute something else: %s", layout, difference)
    prefix = "" if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
    state = {prefix + name: tensor.detach() for name, tensor in model.state_dict().items()}
    return to_theirs(state, place, model.config)


def _place_of(model: SwinHFPreTrainedModel, layout: str) -> Place:
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    kind = next((kind for kind, model_class in MODELS.items() if isinstance(model, model_class)), None)
    if kind is None:
        names = ", ".join(model_class.__name__ for model_class in MODELS.values())
        raise ValueError(
            f"{type(model).__name__} is not a model of this package ({names}); load it with load_checkpoint"
        )
    layouts = LAYOUTS_V2 if model.config.cosine_attention else LAYOUTS
    if layout not in layouts:
        raise ValueError(f"the {layout} layout has no Swin Transformer V2; choose one of {', '.join(layouts)}")
    chosen = layouts[layout]
    if kind not in chosen.trunks:
        held = ", ".join(kind.value for kind in chosen.trunks)
        raise ValueError(
            f"the {layout} layout has no {kind.value}, only: {held}; load the checkpoint as one of these first "
            "(load_checkpoint(..., model_class=...))"
        )
    return Place(chosen, kind, model.config.depths, "", chosen.trunks[kind][0])


def objections_to(config: SwinHFConfig, layout: Layout, kind: Kind) -> list[str]:
    """What the code of a layout cannot build, with the remedy; empty if it can build the model."""
    windows, objections = config.stage_windows, []
    shapes = ", ".join(f"{height}x{width}" for height, width in windows)
    is_square = all(height == width for height, width in windows)
    grid, rule = config.grid_hw, layout.small_maps
    is_one = cut_windows(windows, grid, rule) == cut_windows([max(windows)] * len(windows), grid, rule)
    can_build = {Windows.ANY: True, Windows.ONE: is_one, Windows.ONE_SQUARE: is_one and is_square}
    if not can_build[layout.windows]:
        objections.append(
            f"it has {layout.windows.value}, the model {shapes}; model.set_input_size(window_size=...) resamples them"
        )
    units = config.bias_units if isinstance(config, SwinV2HFConfig) else windows
    if layout.name == "torchvision" and units != windows:
        words = ", ".join(f"{height}x{width}" for height, width in units)
        objections.append(f"it divides offsets by the window, {shapes}, and the model by {words}")
    if layout.name.startswith("transformers") and config.cosine_attention:
        if any(height != width for height, width in units):
            objections.append("it has square pretrained windows")
        if config.use_absolute_embeddings:
            objections.append("its position embeddings have a row for a class token, which its forward pass refuses")
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
    if checkpoint.place.kind is Kind.CLASSIFIER and "classifier.weight" not in checkpoint.translation.state:
        model.reset_classifier(0)  # a random one is not written
    place, config = _place_of(model, to), model.config
    values = processor_values(checkpoint, config)
    preprocessing = Preprocessing.from_values(values or {})
    texts: dict[str, Any] = {CONFIG_NAME: describe(model, place, preprocessing)}
    if values is None:
        logger.warning(
            "no preprocessor_config.json is written: how images of %d channels were normalised is not known",
            config.num_channels,
        )
    elif preprocessing and to.startswith(("transformers", "maskformer", "timm")):
        texts[PREPROCESSOR_NAME] = preprocessing.stock_values()  # ours is for a configuration of ours
    else:
        texts[PREPROCESSOR_NAME] = values
    state = export_checkpoint(model, to)
    files = write_files(destination, weights, state, place.layout, texts, class_table(config.id2label))
    logger.info("written in the %s layout: %s", to, ", ".join(map(str, files)))
    return files


def describe(model: SwinHFPreTrainedModel, place: Place, preprocessing: Preprocessing | None) -> dict[str, Any]:
    """``config.json`` for a layout: transformers' for its own, timm's for timm, ours for all others."""
    layout, config = place.layout, model.config
    if layout.name == "timm":
        return _describe_for_timm(config, place.kind, preprocessing)
    if not layout.name.startswith(("transformers", "maskformer")):
        return {**config.to_dict(), "architectures": [type(model).__name__]}
    name = "MaskFormerSwin" if layout.name == "maskformer-swin" else "Swinv2" if config.cosine_attention else "Swin"
    config_class: Any = getattr(transformers, f"{name}Config")
    values = config_class(**transformers_fields(config, config_class)).to_dict()
    return {**values, "architectures": [MODELS[place.kind].__name__.replace("SwinHF", name)]}


def transformers_fields(config: SwinHFConfig, config_class: Any) -> dict[str, Any]:
    """Fields of one of transformers' own Swin configurations for the same network."""
    derived = {"model_type", "num_layers", "hidden_size", "stage_names", "architectures", "transformers_version"}
    known = {*config_class().to_dict(), "id2label", "label2id", "problem_type"} - derived
    values = {name: value for name, value in config.to_dict().items() if name in known}
    return {**values, "window_size": config.stage_windows[0][0]}


def timm_arguments(config: SwinHFConfig) -> dict[str, Any]:
    """Arguments of timm's classes for the same network."""
    same = ("patch_size", "embed_dim", "depths", "num_heads", "mlp_ratio", "qkv_bias", "pretrained_window_sizes")
    return {
        "img_size": list(config.image_hw),
        "in_chans": config.num_channels,
        "window_size": [list(window) for window in config.stage_windows],
        **{name: getattr(config, name) for name in same if hasattr(config, name)},
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


def check_destination(destination: Path, to: str, overwrite: bool) -> Path:
    """Refuse a destination that could not be written in a layout; returns the file of its weights.

    Raises:
        ValueError: If there is no such layout, or the file is of a kind that is not written.
        FileExistsError: If a file of the destination exists and may not be replaced, or other weights in the folder
            may belong to the JSON files there; ``overwrite`` means the files of one model.
    """
    if to not in LAYOUTS:
        raise ValueError(f"unknown layout {to!r}; choose one of {', '.join(LAYOUTS)}")
    if destination.suffix == ".ckpt":
        raise ValueError(f"{destination}: only Lightning writes .ckpt files; choose .safetensors, .pth, .pt or .bin")
    is_file = destination.suffix in WEIGHT_SUFFIXES
    weights = destination if is_file else destination / LAYOUTS[to].file_name
    texts = [path for path in map(weights.with_name, (CONFIG_NAME, PREPROCESSOR_NAME)) if path.exists()]
    taken = [str(path) for path in (destination, *(texts if is_file else ())) if path.exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{', '.join(taken)} exists; choose another destination, or pass overwrite (--overwrite)")
    files = weights.parent.iterdir() if texts else ()
    if others := sorted(path.name for path in files if path.suffix in WEIGHT_SUFFIXES and path.name != weights.name):
        raise FileExistsError(
            f"{weights.parent} holds {', '.join(others[:3])}, to which its {' and '.join(path.name for path in texts)} "
            "may belong; nothing was written: choose a folder of its own for the destination"
        )
    return weights


def write_files(
    destination: Path,
    weights: Path,
    state: dict[str, Tensor],
    layout: Layout,
    texts: Mapping[str, Mapping[str, Any]],
    classes: list[str],
) -> list[Path]:
    """Write a new folder, or the files of one that exists one by one, the weights last; all of them are returned.

    ``weights`` is the file of ``state``, ``texts`` are the values of JSON files by name; OpenMMLab keeps the names of
    the classes with the weights.
    """
    names = [*texts, weights.name]
    with temporary_folder(destination) as stage:
        path = stage / weights.name
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(state, path, metadata={"format": "pt"})
            path.chmod(stage.stat().st_mode & 0o666)  # safetensors keeps the file from everybody else
        else:
            content: dict[str, Any] = {layout.wrapper: state} if layout.wrapper else state
            if layout.name == "openmmlab":
                content["meta"] = {"dataset_meta": {"classes": classes}}
            with path.open("wb") as file:
                torch.save(content, file)
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # a full disk may show only here
        for name, values in texts.items():
            text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
            (stage / name).write_text(text + "\n", encoding="utf-8")
        if destination == weights or destination.is_dir():
            for name in names:
                (stage / name).replace(weights.with_name(name))
        else:
            stage.replace(destination)
    return [weights.with_name(name) for name in names]
