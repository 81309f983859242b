"""What a network's sizes are: from the shapes of its weights, and from the files in their folder."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from swin_hf.checkpoints import sizes_swinv2
from swin_hf.checkpoints.detect import MODEL_TYPES, is_v2
from swin_hf.checkpoints.sizes_swinv2 import short
from swin_hf.checkpoints.tables import Buffer, Kind
from swin_hf.checkpoints.translate import Place, Translation, windows_at_home
from swin_hf.families import config_of_preset, list_presets
from swin_hf.model.configuration_swin_hf import SwinHFConfig, as_pair
from swin_hf.model.windows import Pair, relative_position_index, shift_mask, window_geometry
from swin_hf.presets import SWIN, SWINV2

# Fields that the shapes of the weights decide, in the order in which a contradiction is told.
ARCHITECTURE = (
    "embed_dim", "depths", "num_heads", "patch_size", "num_channels", "mlp_ratio", "qkv_bias",
    "use_absolute_embeddings",
)  # fmt: skip
# What a configuration file may say on top of that.
_TOLD = (
    *ARCHITECTURE, "image_size", "window_size", "pretrained_window_sizes", "norm_features", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "drop_path_rate", "hidden_act", "initializer_range", "layer_norm_eps",
    "shift_per_axis", "mask_padding", "norm_targets", "out_features", "num_labels", "id2label", "label2id",
    "problem_type",
)  # fmt: skip
_INDICES = (Buffer.INDEX, Buffer.FLAT_INDEX)
_TABLE = "swin.stages.{}.blocks.0.attention.relative_position_bias_table"
_LOGIT_SCALE = "swin.stages.{}.blocks.0.attention.logit_scale"


def fields_from_shapes(translation: Translation, hint: SwinHFConfig | None) -> dict[str, Any]:
    """Fields of the configuration that the weights decide; ``image_size`` and ``num_labels`` where a tensor shows them.

    ``hint`` may tell a 3x4 window from a 4x3 one, which have equally long bias tables. ValueError if a window cannot be
    told, or a weight that shows a size is missing.
    """
    state = translation.state
    channels, *patch = state["swin.embeddings.patch_embeddings.weight"].shape[1:]
    biases = ("swin.stages.0.blocks.0.attention.qkv.bias", "swin.stages.0.blocks.0.attention.q_bias")
    fields = {
        **basic_fields(translation),
        "qkv_bias": any(name in state for name in biases),
        "use_absolute_embeddings": "swin.embeddings.position_embeddings" in state,
    }
    if is_v2(state):
        fields |= sizes_swinv2.windows_of(translation, hint)
        extra = [int(found[1]) + 1 for key in state if (found := re.search(r"blocks\.(\d+)\.norm3\.", key))]
        fields["extra_norm_every_n_blocks"] = min(extra, default=0)
    else:
        fields["window_size"] = _windows_of_tables(translation, hint)
    grid = _grid(translation, stage_windows(fields), hint)
    if grid is not None:
        fields["image_size"] = short([side * size for side, size in zip(grid, patch, strict=True)])
    if "classifier.weight" in state:
        fields["num_labels"] = state["classifier.weight"].shape[0]
    if "decoder.0.weight" in state:
        fields["encoder_stride"] = math.isqrt(state["decoder.0.weight"].shape[0] // channels)
    if "decode_head.classifier.weight" in state:
        fields["num_labels"], hidden = state["decode_head.classifier.weight"].shape[:2]
        auxiliary = state.get("auxiliary_head.classifier.weight")
        other = {"auxiliary_loss_weight": 0} if auxiliary is None else {"auxiliary_channels": auxiliary.shape[1]}
        fields["upernet"] = {"hidden_size": hidden, **other}
    if translation.place.kind in (Kind.BACKBONE, Kind.SEGMENTER):
        names = ["stem", *(f"stage{number}" for number in range(1, len(translation.place.depths) + 1))]
        fields["out_features"] = [name for name in names if f"hidden_states_norms.{name}.weight" in state]
    return fields


def _windows_of_tables(translation: Translation, hint: SwinHFConfig | None) -> Any:
    """``window_size`` from the ``(2h - 1)(2w - 1)`` rows of each stage's table; ValueError where nothing tells it.

    The index buffer of the block tells 3x4 from 4x3, if the file has it; else the hint of a configuration does.
    """
    windows, place = [], translation.place
    guesses: Sequence[Pair | None] = [None] * len(place.depths)
    if hint is not None and hint.num_layers == len(place.depths):
        guesses = windows_at_home(hint, place)
    for stage, guess in enumerate(guesses):
        rows = translation.state[_TABLE.format(stage)].shape[0]
        odd = [side for side in range(1, rows + 1, 2) if rows % side == 0 and rows // side % 2]
        fitting = [((side + 1) // 2, (rows // side + 1) // 2) for side in odd]
        buffers = translation.buffers.items()
        index = next((tensor for (buffer, i, _), tensor in buffers if buffer in _INDICES and i == stage), None)
        if index is not None:
            by_size = [window for window in fitting if math.prod(window) ** 2 == index.numel()]
            if not index.is_meta:
                flat = index.flatten().to("cpu", torch.int64)
                by_size = [w for w in by_size if torch.equal(relative_position_index(w).flatten(), flat)] or by_size
            fitting = by_size or fitting
        chosen = [guess] if guess in fitting else [window for window in fitting if window[0] == window[1]] or fitting
        if len(chosen) != 1:
            shapes = ", ".join(f"{height}x{width}" for height, width in fitting) or "no window at all"
            raise ValueError(
                f"the bias table of stage {stage + 1} has {rows} rows, which fits {shapes}; say which with "
                "config=SwinHFConfig(window_size=..., ...)"
            )
        windows.append(chosen[0])
    return short(windows[0]) if len(set(windows)) == 1 else [list(window) for window in windows]


def basic_fields(translation: Translation) -> dict[str, Any]:
    """The fields that follow from single shapes, whatever the windows are; ValueError if one is not there."""
    state, depths = translation.state, translation.place.depths
    try:
        dim, channels, *patch = state["swin.embeddings.patch_embeddings.weight"].shape
        hidden = state["swin.stages.0.blocks.0.mlp.fc1.weight"].shape[0]
        name, axis = (_LOGIT_SCALE, 0) if is_v2(state) else (_TABLE, 1)
        heads = [state[name.format(stage)].shape[axis] for stage in range(len(depths))]
    except KeyError as error:
        raise ValueError(f"our {error.args[0]} has no counterpart in the file; it is incomplete") from error
    return {
        "embed_dim": dim,
        "depths": list(depths),
        "num_heads": heads,
        "patch_size": short(patch),
        "num_channels": channels,
        "mlp_ratio": hidden / dim,
    }


def _grid(translation: Translation, windows: Sequence[Pair], hint: SwinHFConfig | None) -> Pair | None:
    """Height and width of the first stage's map at the training image size, if a tensor shows it."""
    positions = translation.state.get("swin.embeddings.position_embeddings")
    if positions is not None:
        count = positions.shape[1]
        if hint is not None and math.prod(hint.grid_hw) == count:
            return hint.grid_hw
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(
                f"{count} position embeddings do not make a square map; say which with "
                "config=SwinHFConfig(image_size=...)"
            )
        return side, side
    for (buffer, stage, _), mask in translation.buffers.items():
        if buffer is Buffer.MASK and (counts := _windows_of_mask(mask, windows[stage])) is not None:
            return as_pair(count * side * 2**stage for count, side in zip(counts, windows[stage], strict=True))
    return None


def _windows_of_mask(mask: Tensor, window: Pair) -> Pair | None:
    """Rows and columns of windows that a shift mask ``(nW, N, N)`` covers, None where that cannot be told."""
    count = mask.shape[0]
    side = math.isqrt(count)
    if mask.is_meta:
        return (side, side) if side * side == count else None
    for rows in sorted((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - side)):
        grid = (rows * window[0], count // rows * window[1])
        candidate = shift_mask(window_geometry(grid, window, shifted=True, shift_per_axis=True))
        if candidate.shape == mask.shape and torch.equal(candidate, mask.to("cpu", torch.float32)):
            return rows, count // rows
    return None


def told_by(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that a ``config.json`` of transformers, timm or ours says; empty for one of another model."""
    if isinstance(config_json.get("backbone_config"), Mapping):
        config_json = config_json["backbone_config"]
    if config_json.get("model_type") in MODEL_TYPES:
        return {name: config_json[name] for name in _TOLD if config_json.get(name) is not None}
    if "swin" not in (architecture := str(config_json.get("architecture"))):
        return {}
    # What follows are the names of timm.
    pretrained, arguments = config_json.get("pretrained_cfg") or {}, config_json.get("model_args") or {}
    told = sizes_swinv2.told_by_name(architecture)
    sizes = ("window_size", "pretrained_window_sizes", "drop_path_rate")
    told |= {name: arguments[name] for name in sizes if arguments.get(name) is not None}
    size = arguments.get("img_size") or list(pretrained.get("input_size") or [])[1:]
    if size:
        told["image_size"] = size if isinstance(size, int) else short(size)
    names = config_json.get("label_names") or pretrained.get("label_names")
    names = [] if config_json.get("num_classes") == 0 else names
    descriptions = config_json.get("label_descriptions") or pretrained.get("label_descriptions") or {}
    if isinstance(names, list):
        told["id2label"] = {
            number: str(descriptions.get(name, name)) if isinstance(descriptions, Mapping) else str(name)
            for number, name in enumerate(names)
        }
    return told


def told_by_training(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that the arguments of one of our LightningModules say, also before those of the network were a group."""
    preset, presets = arguments.get("preset"), {**SWIN, **SWINV2}
    started = arguments.get("weights") or arguments.get("model")
    told = dict(presets[preset]) if preset in presets and not started else {}
    group = arguments.get("network")
    for options in (group if isinstance(group, Mapping) else {}, arguments):
        overrides = options.get("overrides")
        told.update(overrides if isinstance(overrides, Mapping) else {})
        told.update({name: options[name] for name in _TOLD if options.get(name) is not None})
    if "id2label" in told:
        told.pop("num_labels", None)  # the preset's, which the names of the classes replace
    return told


def presets_like(fields: Mapping[str, Any], place: Place) -> list[str]:
    """Presets of the same architecture and windows; those with as many classes, if there are such."""
    likely = [
        name
        for name, config in _preset_configs().items()
        if all(getattr(config, field) == fields[field] for field in ARCHITECTURE)
        and stage_windows(fields) in (config.stage_windows, tuple(windows_at_home(config, place)))
        and getattr(config, "pretrained_window_sizes", None) == fields.get("pretrained_window_sizes")
    ]
    classes = {name: preset.get("num_labels", 2) for name, preset in {**SWIN, **SWINV2}.items()}
    return [name for name in likely if classes[name] == fields.get("num_labels")] or likely


@cache
def _preset_configs() -> dict[str, SwinHFConfig]:
    """The presets without the names of 21,841 classes, which take longer than reading the weights."""
    return {name: config_of_preset(name, num_labels=2) for name in list_presets()}


def stage_windows(fields: Mapping[str, Any]) -> tuple[Pair, ...]:
    """Window of each stage that some fields mean."""
    sizes = ("embed_dim", "depths", "num_heads", "window_size")
    return SwinHFConfig(**{name: fields[name] for name in sizes}).stage_windows


def contradictions(fields: Mapping[str, Any], config: SwinHFConfig, with_labels: bool) -> list[str]:
    """Where a configuration says something else than the weights; windows and image size can be resampled."""
    names = [*ARCHITECTURE, *(["num_labels"] if with_labels and "num_labels" in fields else [])]
    there = {name: getattr(config, name) for name in names} | {"patch_size": short(config.patch_hw)}
    others = [name for name in names if there[name] != fields[name]]
    return [f"{name} is {there[name]} there but {fields[name]} in the weights" for name in others]


def strides(fields: Mapping[str, Any]) -> Pair:
    """Height and width, in pixels, of a token of the last stage."""
    return as_pair(side * 2 ** (len(fields["depths"]) - 1) for side in as_pair(fields["patch_size"]))


def wrong_indices(translation: Translation, config: SwinHFConfig) -> Iterator[tuple[int, int]]:
    """Stage and block of index buffers that are not what the window demands, as a careless average leaves them."""
    windows = windows_at_home(config, translation.place)
    for (buffer, stage, block), index in translation.buffers.items():
        if buffer in _INDICES and not index.is_meta:
            expected = relative_position_index(windows[stage]).flatten()
            if not torch.equal(expected, index.flatten().to("cpu", torch.int64)):
                yield stage, block
