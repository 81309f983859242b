"""From a checkpoint of any layout to one of our models."""

import copy
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights
from transformers.utils import logging as logging_of_transformers

from swin_hf.checkpoints import derive, sizes_swinv2
from swin_hf.checkpoints.detect import MODEL_TYPES, detect, refuse_strangers
from swin_hf.checkpoints.preprocessing import processor_values
from swin_hf.checkpoints.read import Source, Weights, read_source
from swin_hf.checkpoints.tables import Kind
from swin_hf.checkpoints.translate import Place, Translation, differences, listed, their_names, to_ours, windows_at_home
from swin_hf.classes import class_table
from swin_hf.families import FAMILIES, TASKS, config_of_preset
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.modeling_swin_hf import SwinHFBackbone, SwinHFPreTrainedModel
from swin_hf.model.segmentation_swin_hf import SwinHFForSemanticSegmentation

logger = logging.getLogger(__name__)

Size = int | tuple[int, int] | list[Any]

_TASKS = {
    Kind.CLASSIFIER: "image-classification",
    Kind.BASE: "features",
    Kind.MIM: "masked-image-modeling",
    Kind.BACKBONE: "backbone",
    Kind.SEGMENTER: "semantic-segmentation",
}
# Of V1; the classes of V2 are made from these.
MODELS: dict[Kind, Any] = {kind: FAMILIES["swin_hf"].model_class(task) for kind, task in _TASKS.items()}


def class_for(place: Place) -> Any:
    """Our model class for what a state dict holds."""
    return FAMILIES[place.layout.family].model_class(_TASKS[place.kind])


# Prefixes of the keys that one class has and another has not: left out, or freshly initialised.
_HEADS = tuple(dict.fromkeys(part for task in TASKS.values() for part in task.head))


@dataclass
class Checkpoint:
    """An opened checkpoint: the weights under our names, and everything that is known of them."""

    source: Source  # the file or folder as read
    place: Place  # layout, kind and prefixes
    translation: Translation  # the weights under our names
    config: SwinHFConfig  # sizes of these weights
    target: SwinHFConfig  # sizes that were asked for; another window or image size than in ``config`` means resampling
    presets: list[str]  # of this architecture and these windows, the likeliest first
    notes: list[str]  # what was found and assumed, in words

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds every weight without loss."""
        types = {tensor.dtype for tensor in self.translation.state.values() if tensor.is_floating_point()}
        return reduce(torch.promote_types, types)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.numel() for tensor in self.translation.state.values())

    def __str__(self) -> str:
        """One line that says what was found."""
        config = self.config
        preset = self.presets[0] if self.presets else "no preset"
        version = "Swin V2 " if config.cosine_attention else ""
        pretrained = getattr(config, "pretrained_window_sizes", [])
        windows = f"window {config.window_size}" + (f" (pre-trained in {pretrained})" if any(pretrained) else "")
        has_head = "classifier.weight" in self.translation.state
        return (
            f"{self.source.name}: {self.place.layout.name} layout, {version}{self.place.kind.value}, {preset}, "
            f"embed_dim {config.embed_dim}, depths {config.depths}, heads {config.num_heads}, {windows}, image "
            f"{config.image_size}, {f'{config.num_labels} classes' if has_head else 'no classifier'}, "
            f"{self.parameters / 1e6:.2f} M parameters in {str(self.dtype).removeprefix('torch.')}"
            + "".join(f"; {note}" for note in [*self.source.notes, *self.notes])
        )


def open_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any] | Source,
    layout: str | None = None,
    preset: str | None = None,
    config: SwinHFConfig | None = None,
    *,
    weights: Weights | None = None,
    image_size: Size | None = None,
    window_size: Size | None = None,
) -> Checkpoint:
    """Read a checkpoint and find out what it is, without building a model; see :func:`load_checkpoint`."""
    if preset is not None and config is not None:
        raise ValueError(f"both preset {preset!r} and a config were given; give one of them")
    asked = config_of_preset(preset) if preset is not None else config
    source = source if isinstance(source, Source) else read_source(source, weights)
    try:
        return _open(source, layout, preset, asked, {"image_size": image_size, "window_size": window_size})
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error


def _open(
    source: Source, layout: str | None, preset: str | None, asked: SwinHFConfig | None, sizes: dict[str, Size | None]
) -> Checkpoint:
    if source.is_folder:
        refuse_strangers(source.config_json, "it")
    place = detect(source.state.keys(), layout)
    translation = to_ours(source.state, place)
    state = translation.state
    wrong = [name for name in state if not (state[name].is_floating_point() or name.endswith(".num_batches_tracked"))]
    if wrong:
        kind = str(state[wrong[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{len(wrong)} weights are not floating-point numbers ({wrong[0]} is {kind}); give the unquantised file"
        )
    config_class, told_type = FAMILIES[place.layout.family].config_class, str(source.config_json.get("model_type"))
    held = f"the weights are those of {_VERSIONS[config_class.model_type]}"
    if asked is not None and type(asked) is not config_class:
        raise ValueError(
            f"{held}, and {type(asked).__name__} is of {_VERSIONS[asked.model_type]}; give a {config_class.__name__}, "
            "or a preset of this version"
        )
    is_other = told_type in MODEL_TYPES and told_type.startswith("swinv2") != config_class.cosine_attention
    if source.is_folder and is_other:
        raise ValueError(
            f"{held}, and config.json is of model_type {told_type!r}, the other version of Swin Transformer; put the "
            "files together that belong together"
        )
    notes = [f"{len(translation.dropped)} tensors outside of the network left out"] if translation.dropped else []
    fields, told = _sizes(source, translation, asked, notes)
    if asked is not None and (others := derive.contradictions(fields, asked, with_labels=preset is None)):
        name = f"preset {preset}" if preset else "the config that was given"
        raise ValueError(f"the weights contradict {name}: {'; '.join(others)}. Leave it out to have the sizes derived")
    presets = [preset] if preset else derive.presets_like(fields, place)
    found = _configuration(source, place, presets, fields, told, asked, notes)
    if odd := list(derive.wrong_indices(translation, found)):
        stage, block = odd[0]
        logger.warning(
            f"{source.name}: the relative position index of {len(odd)} blocks (first: stage {stage + 1}, block "
            f"{block + 1}) is not that of its window, as an averaged integer buffer is not; the right one is used"
        )
    changes = {} if asked is None else {name: getattr(asked, name) for name in sizes}
    if asked is not None and windows_at_home(asked, place) == list(found.stage_windows):
        del changes["window_size"]  # they were cut to the maps: the table of larger ones is not in the weights
    changes |= {name: size for name, size in sizes.items() if size is not None}
    target = type(found).from_dict({**found.to_dict(), **changes})
    if target.stage_windows != found.stage_windows:
        way = "the bias of every offset kept" if found.cosine_attention else "bias tables resampled"
        method = _METHODS.get(place.kind, "bicubic")
        notes.append(f"{way} from window {found.window_size} to {target.window_size}, {method}")
    for difference in differences(target, place):
        notes.append(f"the code of the {place.layout.name} layout computes something else: {difference}")
        logger.warning("%s: %s", source.name, notes[-1])
    return Checkpoint(source, place, translation, found, target, presets, notes)


def _sizes(
    source: Source, translation: Translation, asked: SwinHFConfig | None, notes: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the shapes of the weights say, and what the files in their folder say on top, unless it does not fit."""
    config_class = FAMILIES[translation.place.layout.family].config_class
    told = {**derive.told_by_training(source.training), **derive.told_by(source.config_json)}
    if config_class.cosine_attention:
        told = {**sizes_swinv2.told_by_name(source.name), **told}
    hint = asked
    if asked is None and ("window_size" in told or not config_class.cosine_attention):
        hint = _config_or_none(config_class, {**told, **derive.basic_fields(translation)})
    fields = derive.fields_from_shapes(translation, hint)
    # In a folder, config.json has to fit the weights; next to a single file, it may be that of another model.
    config = _config_or_none(config_class, {**fields, **told})
    wrong = [] if config is None else derive.contradictions(fields, config, with_labels=False)
    if config is not None and not wrong:
        return fields, told
    reason = "; ".join(wrong) or "its sizes contradict each other"
    if source.is_folder or source.training:
        raise ValueError(f"config.json contradicts the weights: {reason}. Correct it, or give preset= or config=")
    notes.append(f"config.json next to the file ignored, it is of another model ({reason})")
    logger.warning("%s: config.json next to it is ignored, it is of another model: %s", source.name, reason)
    return fields, {}


def _configuration(
    source: Source,
    place: Place,
    presets: list[str],
    fields: dict[str, Any],
    told: dict[str, Any],
    asked: SwinHFConfig | None,
    notes: list[str],
) -> SwinHFConfig:
    """The configuration of the weights: their own sizes before what was told, and that before the likeliest preset."""
    likely = config_of_preset(presets[0]).to_dict() if presets else {}
    values: dict[str, Any] = {"encoder_stride": derive.strides(fields)[0]}
    values |= {name: likely[name] for name in ("drop_path_rate", "image_size", "encoder_stride") if name in likely}
    given = {} if asked is None else asked.to_dict()
    values |= {name: value for name, value in given.items() if name not in _NOT_CARRIED}
    values |= {**told, **fields}
    values |= {name: value for name, value in given.items() if name in _FREE}
    if "image_size" not in values:  # that of every released model of these windows
        sides = zip(derive.stage_windows(fields)[-1], derive.strides(fields), strict=True)
        values["image_size"] = sizes_swinv2.short([window * side for window, side in sides])
        notes.append(f"image size {values['image_size']} assumed, with which the last stage is one window")
    if place.layout.name != "swin_hf":
        values["shift_per_axis"] = place.layout.shift_per_axis
    for name in ("num_labels", "id2label", "label2id"):
        values.pop(name, None)
    names = source.classes or class_table(told.get("id2label"))
    if asked is not None and "LABEL_0" not in class_table(asked.id2label):
        names = class_table(asked.id2label)
    count = fields.get("num_labels")
    if count is None:  # there is no classifier: a fresh one is made for these
        told_none = told.get("id2label") == {}  # a model without classes
        fallback = 0 if told_none else len(likely["id2label"]) if likely else 2
        count = asked.num_labels if asked is not None else told.get("num_labels") or len(names) or fallback
    if len(names) == count:
        values |= {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    else:
        values["num_labels"] = count
    if place.kind is Kind.BACKBONE and not fields["out_features"]:  # transformers' of V2 has no norms for its maps
        values |= {"norm_features": False, "out_features": told.get("out_features")}
    return FAMILIES[place.layout.family].config_class(**values)


_METHODS = {Kind.MIM: "geometric"}  # SimMIM's fine-tuning code resamples bias tables in another way than the rest
_VERSIONS = {"swin_hf": "Swin Transformer V1", "swinv2_hf": "Swin Transformer V2"}
# Fields that the weights decide, or the code above, whatever a given configuration says.
_NOT_CARRIED = {*derive.ARCHITECTURE, "window_size", "pretrained_window_sizes"}
_NOT_CARRIED |= {"id2label", "label2id", "architectures", "dtype", "model_type"}
# Fields of a given configuration that come before those of the files next to the weights.
_FREE = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "hidden_act", "layer_norm_eps",
    "mask_padding", "norm_targets",
)  # fmt: skip


def _config_or_none(config_class: type[SwinHFConfig], told: Mapping[str, Any]) -> SwinHFConfig | None:
    """A configuration of these fields, as far as they make one."""
    try:
        return config_class(**told)
    except (ValueError, TypeError):
        return None


def state_for(checkpoint: Checkpoint, model_class: type[SwinHFPreTrainedModel]) -> dict[str, Tensor]:
    """The weights of an opened checkpoint under the keys of one of our classes; those of a file are not copied.

    A head may be missing, to be initialised, or left over; both are logged. ValueError if anything else is, or a weight
    has another shape than the others demand.
    """
    config, place, wanted = checkpoint.config, checkpoint.place, model_class.config_class.model_type
    if config.model_type != wanted:
        raise ValueError(
            f"{checkpoint.source.name} holds {_VERSIONS[config.model_type]} and {model_class.__name__} is "
            f"{_VERSIONS[wanted]}; use {class_for(place).__name__}"
        )
    with torch.device("meta"), no_init_weights():
        model = model_class(config)
    prefix = "" if hasattr(model, "swin") else "swin."
    expected = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state = dict(checkpoint.translation.state)
    last_norm = f"hidden_states_norms.stage{config.num_layers}."
    for suffix in ("weight", "bias"):
        if f"swin.norm.{suffix}" in expected and last_norm + suffix in state:
            state.setdefault(f"swin.norm.{suffix}", state[last_norm + suffix])

    fresh = sorted(expected.keys() - state.keys())
    left_out = sorted(state.keys() - expected.keys())
    had_maps = place.kind in (Kind.BACKBONE, Kind.SEGMENTER)  # with a norm each, the last one too
    replaceable = (*_HEADS, "swin.norm.") if had_maps else _HEADS
    if missing := [name for name in fresh if not name.startswith(replaceable)]:
        raise ValueError(f"{checkpoint.source.name} is incomplete, it lacks {listed(their_names(place, missing))}")
    has_maps = issubclass(model_class, SwinHFBackbone | SwinHFForSemanticSegmentation)
    droppable = (*_HEADS, "swin.norm.") if has_maps else _HEADS
    if surplus := [name for name in left_out if not name.startswith(droppable)]:
        raise ValueError(f"{model_class.__name__} has no place for {listed(their_names(place, surplus))}")
    if wrong := [name for name in expected if name in state and state[name].shape != expected[name].shape]:
        found, demanded = (tuple(tensors[wrong[0]].shape) for tensors in (state, expected))
        raise ValueError(
            f"{checkpoint.source.name}: the shapes contradict each other: {listed(their_names(place, wrong))}; "
            f"{wrong[0]} is {found} where the rest demands {demanded}"
        )
    if fresh:
        logger.info("%s: freshly initialised and not trained: %s", checkpoint.source.name, listed(fresh))
    if left_out:
        logger.info("%s: not part of %s: %s", checkpoint.source.name, model_class.__name__, listed(left_out))
    dtype, copied = checkpoint.dtype, checkpoint.source.is_borrowed
    return {
        name.removeprefix(prefix): tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=copied)
        for name, tensor in state.items()
        if name in expected
    }


def build_model(checkpoint: Checkpoint, model_class: type[Any] | None = None) -> Any:
    """Build a model of one of our classes from an opened checkpoint, in the sizes that were asked for.

    Without a class, it is a segmenter of what is one, and a classifier of everything else.
    """
    place, config, target = checkpoint.place, copy.deepcopy(checkpoint.config), checkpoint.target
    if model_class is None:
        model_class = class_for(place if place.kind is Kind.SEGMENTER else place._replace(kind=Kind.CLASSIFIER))
    config.dtype = checkpoint.dtype
    sizes: dict[str, Any] = {"image_size": target.image_size, "window_size": target.window_size}
    is_other = (target.image_hw, target.stage_windows) != (config.image_hw, config.stage_windows)
    with quiet():
        model = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state_for(checkpoint, model_class),
            method=_METHODS.get(place.kind, "bicubic"),
            **(sizes if is_other else {}),
        )
    processor: Any = config.image_hw, processor_values(checkpoint, config)  # which save_pretrained writes
    model._processor = processor
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off transformers' progress bar and its report of the weights; our log says what matters."""
    shown, verbosity = logging_of_transformers.is_progress_bar_enabled(), logging_of_transformers.get_verbosity()
    logging_of_transformers.disable_progress_bar()
    logging_of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        logging_of_transformers.set_verbosity(verbosity)
        if shown:
            logging_of_transformers.enable_progress_bar()
