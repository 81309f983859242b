"""Our backbone under an existing model of transformers: the same outputs, the same files, another engine."""

import re
from collections.abc import Iterator
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from swin_hf.checkpoints import derive
from swin_hf.checkpoints.detect import count_blocks, is_v2
from swin_hf.checkpoints.tables import LAYOUTS, Kind
from swin_hf.checkpoints.tables_swinv2 import LAYOUTS_V2
from swin_hf.checkpoints.translate import (
    Place,
    Translation,
    differences,
    expand,
    our_key,
    stage_maps,
    to_ours,
    to_theirs,
)
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.configuration_swinv2_hf import SwinV2HFConfig
from swin_hf.model.modeling_swin_hf import SwinHFBackbone, SwinHFModel
from swin_hf.model.modeling_swinv2_hf import SwinV2HFBackbone, SwinV2HFModel
from swin_hf.model.outputs import Record


class Peer(NamedTuple):
    """A class of another library that is a Swin: where its weights are, and how it ends."""

    layout: str
    kind: Kind
    trunk: str = ""  # prefix of the network in its state dict
    has_norm: bool = True  # after the last stage


PEERS = {
    "SwinBackbone": Peer("transformers-memory", Kind.BACKBONE, "swin."),
    "MaskFormerSwinBackbone": Peer("maskformer-swin", Kind.BACKBONE, "model."),
    "SwinModel": Peer("transformers-memory", Kind.BASE),
    "DonutSwinModel": Peer("transformers-4", Kind.BASE, has_norm=False),
    "Swinv2Backbone": Peer("transformers", Kind.BACKBONE),
    "Swinv2Model": Peer("transformers", Kind.BASE),
    "FeatureListNet": Peer("timm", Kind.BASE, has_norm=False),  # what timm makes of a Swin in a TimmBackbone
}


def replace_backbone(model: Any, revert: bool = False) -> Any:
    """Put our Swin in the place of every Swin in a model of transformers.

    The model computes the same, and ``state_dict``, ``load_state_dict`` and ``save_pretrained`` keep the names and
    files that it had, so that everybody can load what it saves; its parameters are ours, an optimiser has to be made
    anew. In training our stochastic depth drops MLP branches too, as Microsoft's does and that of transformers' V1 does
    not. transformers' V2 adds the shift mask of -100 twice, ours once, as Microsoft does: that changes less than the
    rounding of float32, whatever the scales of the heads.

    Args:
        model: Any model that holds a ``SwinBackbone`` (UperNet, Mask2Former, OneFormer, the DETR family, Grounding
            DINO, ...), ``MaskFormerSwinBackbone``, ``SwinModel``, ``DonutSwinModel``, ``Swinv2Backbone`` (DPT,
            ZoeDepth, ...), ``Swinv2Model``, or a Swin of timm, V1 or V2, in a ``TimmBackbone``; or one of these itself.
        revert: Whether to go back: the modules that were there, with the weights as they are now, bit for bit where
            they were not trained.

    Returns:
        The model; what it is replaced by, where it is itself a Swin.

    Raises:
        ValueError: If it holds none of them, or one that cannot be expressed; the model is as it was.
    """
    if revert:
        ours = [module for module in model.modules() if isinstance(module.__dict__.get("replaced"), _Replaced)]
        swaps = [(module, module.replaced.restore(module)) for module in ours]
    else:
        swaps = [(module, _replacement(name, module)) for name, module in _swins(model)]
    if not swaps:
        looked_for = "a backbone that replace_backbone put there" if revert else ", ".join(PEERS)
        raise ValueError(f"{type(model).__name__} holds no Swin; looked for {looked_for}")
    _keep_names(model, revert)
    for old, new in swaps:
        if not revert:
            new.replaced.free()
        if old is model:
            return new
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new
    return model


def _swins(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every Swin of another library, with its name; none that is a part of another."""
    found: list[str] = []
    for name, module in model.named_modules():
        is_theirs = type(module).__module__.startswith(("transformers.", "timm."))
        if not is_theirs or type(module).__name__ not in PEERS or any(name.startswith(f"{outer}.") for outer in found):
            continue
        keys = _state(module).keys()
        has_bias = is_v2(keys) or any(key.endswith("attn.relative_position_bias_table") for key in keys)
        if has_bias or type(module).__name__ != "FeatureListNet":
            found.append(name)
            yield name, module


def _state(module: nn.Module) -> dict[str, Tensor]:
    """State dict under the names of the key table: timm flattens ``layers.0`` to ``layers_0``."""
    return {_dotted(key): tensor for key, tensor in module.state_dict().items()}


def _dotted(key: str) -> str:
    return re.sub(r"^layers_(\d)", r"layers.\1", key)


class _TimmMaps(nn.Module):
    """What timm's ``FeatureListNet`` returns, computed by our model: maps before merging, ``(B, H, W, C)`` each."""

    def __init__(self, swin: SwinHFModel, theirs: Any) -> None:
        super().__init__()
        self.swin = swin
        self.feature_info, self.return_layers = theirs.feature_info, dict(theirs.return_layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """One map for each of ``return_layers``, which a ``TimmBackbone`` sets."""
        numbers = [int(re.sub(r"\D", "", layer)) + 1 for layer in self.return_layers]
        record = Record(self.swin.config, False, True, merged=False)
        self.swin.run(x, record, num_stages=max(numbers))
        maps: Any = record.states()["reshaped_hidden_states"]  # B, C, H, W
        return [maps[number].permute(0, 2, 3, 1).contiguous() for number in numbers]


class _TokenBackbone(SwinV2HFBackbone):
    """Ours with the hidden states of transformers' ``Swinv2Backbone``, which are tokens ``(B, L, C)`` and not maps."""

    @can_return_tuple
    def forward(self, *args: Any, **kwargs: Any) -> BackboneOutput:
        """See :class:`~swin_hf.SwinV2HFBackbone`."""
        output: Any = super().forward(*args, **kwargs | {"return_dict": True})
        if output.hidden_states is not None:
            output.hidden_states = tuple(state.flatten(2).transpose(1, 2) for state in output.hidden_states)
        return cast(BackboneOutput, output)


class _Replaced:
    """The module that was there, and how its state dict and ours become each other; hooks of our module."""

    def __init__(self, theirs: nn.Module, place: Place, config: SwinHFConfig, ours: set[str], bare: str) -> None:
        self.theirs = (theirs,)  # in a tuple it is not a part of the model
        self.place, self.config, self.bare = place, config, bare
        self.names = list(theirs.state_dict())
        moved = {entry.key for entry in expand(place) if our_key(entry.target) in ours}
        # What no output depends on, and buffers: as they were.
        self.kept = {key: tensor.clone() for key, tensor in _state(theirs).items() if key not in moved}

    def on_save(self, module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        """Give the keys below ``prefix`` their names, in their order."""
        ours = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        like = next(iter(ours.values()))
        found = to_theirs({self.bare + key: tensor for key, tensor in ours.items()}, self.place, self.config)
        for key, tensor in self.kept.items():
            found[key] = tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
        state.update({prefix + name: found[_dotted(name)] for name in self.names})

    def on_load(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Give the keys below ``prefix`` our names, where they have theirs."""
        theirs = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        if not set(theirs) <= set(self.names):
            return  # ours already, or a mixture that load_state_dict will complain of
        theirs = {_dotted(key): state.pop(prefix + key) for key in theirs}
        self.kept.update({key: theirs.pop(key) for key in list(theirs) if key in self.kept})
        ours = to_ours(theirs, self.place).state
        state.update({prefix + key.removeprefix(self.bare): tensor for key, tensor in ours.items()})

    def free(self) -> None:
        """Let go of the weights that were copied into ours."""
        for part in self.theirs[0].modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    def save(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """``save_pretrained`` of the module that was there: its configuration goes with its names."""
        try:
            self.restore(module).save_pretrained(*args, **kwargs)
        finally:
            self.free()

    def restore(self, module: nn.Module) -> Any:
        """The module that was there, with the weights of ours."""
        (theirs,) = self.theirs
        state = module.state_dict()
        theirs.load_state_dict(state, assign=True)
        return theirs.to(next(iter(state.values())).device).train(module.training)


def _replacement(name: str, theirs: Any) -> Any:
    """Our module with the weights of theirs."""
    peer, state = PEERS[type(theirs).__name__], _state(theirs)
    layout = (LAYOUTS_V2 if is_v2(state.keys()) else LAYOUTS)[peer.layout]
    place = Place(layout, peer.kind, count_blocks(state.keys(), layout, peer.trunk), "", peer.trunk)
    try:
        translation = to_ours(state, place)
        config = _config(peer, theirs, translation)
        with torch.device("meta"):
            ours = _build(peer, config, theirs)
        bare = "swin." if isinstance(ours, SwinHFModel) else ""  # begins our names in the tables, not in the module
        names = {bare + key: key for key in ours.state_dict()}
        own = {key: translation.state[long].clone() for long, key in names.items()}
        ours.load_state_dict(own, assign=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name or 'the model'}, a {type(theirs).__name__}, cannot be replaced: {error}") from error
    replaced = _Replaced(theirs, place, config, set(names), bare)
    entries = [entry for entry in expand(place) if our_key(entry.target) in names]
    frozen = {our_key(entry.target) for entry in entries if not _part(theirs, entry.key).requires_grad}
    for long, key in names.items():
        ours.get_parameter(key).requires_grad_(long not in frozen)
    for entry in entries:
        part = ours.get_submodule(names[str(our_key(entry.target))].rpartition(".")[0])
        if isinstance(part, nn.LayerNorm):  # the configuration of transformers does not reach all of its own
            part.eps = _part(theirs, entry.key.rpartition(".")[0]).eps
    ours.replaced = replaced
    ours.register_state_dict_post_hook(partial(replaced.on_save))  # a bound method takes no attributes
    ours.register_load_state_dict_pre_hook(partial(replaced.on_load))
    if isinstance(ours, PreTrainedModel):
        ours.save_pretrained = partial(replaced.save, ours)  # type: ignore[method-assign]
    return ours.train(theirs.training)


def _config(peer: Peer, theirs: Any, translation: Translation) -> Any:
    """Our configuration of their network."""
    place, hint = translation.place, None
    of_v2 = place.layout.family == "swinv2_hf"
    if peer.layout == "timm":
        if of_v2:
            hint = SwinV2HFConfig(**derive.basic_fields(translation), **_windows(theirs, len(place.depths)))
        fields = derive.fields_from_shapes(translation, hint)
        if (pixels := theirs.patch_embed.img_size) is not None:
            fields["image_size"] = list(pixels)
        config = (SwinV2HFConfig if of_v2 else SwinHFConfig)(**fields, shift_per_axis=True)
        different = differences(config, place)
        if _always_partitions(theirs):  # also a map smaller than its window is padded
            for grid, window in zip(stage_maps(config.grid_hw, config.num_layers), config.stage_windows, strict=True):
                if any(n % w and 2 * (n % w) != w for n, w in zip(grid, window, strict=True)):
                    different.append(
                        f"a {grid[0]}x{grid[1]} map is padded, here before the cyclic shift, there after it"
                    )
        if different:
            raise ValueError(f"it computes something else than ours, {different[0]}")
        return config
    told = derive.told_by({**theirs.config.to_dict(), "model_type": "swin"})
    if of_v2:
        told |= _windows(theirs.encoder, len(theirs.encoder.layers))
        told |= {"norm_features": False} if peer.kind is Kind.BACKBONE else {}
    config = (SwinV2HFConfig if of_v2 else SwinHFConfig)(**told)
    if peer.kind is Kind.BACKBONE:
        config.out_features = list(theirs.out_features)
    return config


def _always_partitions(theirs: Any) -> bool:
    """Whether a network of timm cuts maps into windows even where one window covers them."""
    return bool(getattr(_part(theirs, "layers.0").blocks[0], "always_partition", False))  # older releases never do


def _windows(theirs: Any, stages: int) -> dict[str, Any]:
    """Windows of the stages of a V2, and those that offsets are divided by."""
    blocks = [_part(theirs, f"layers.{stage}").blocks[0] for stage in range(stages)]
    layers = [getattr(block, "attn", None) or block.attention.self for block in blocks]
    return {
        "window_size": [list(layer.window_size) for layer in layers],
        "pretrained_window_sizes": [list(p) if any(p := layer.pretrained_window_size) else 0 for layer in layers],
    }


def _build(peer: Peer, config: Any, theirs: Any) -> Any:
    of_v2 = config.cosine_attention
    if peer.kind is Kind.BACKBONE:
        ours: Any = (_TokenBackbone if of_v2 else SwinHFBackbone)(config)
    else:
        options = {"add_pooling_layer": getattr(theirs, "pooler", None) is not None, "add_final_norm": peer.has_norm}
        options["always_partition"] = peer.layout == "timm" and _always_partitions(theirs)
        mask_token = getattr(getattr(theirs, "embeddings", None), "mask_token", None)
        ours = (SwinV2HFModel if of_v2 else SwinHFModel)(config, use_mask_token=mask_token is not None, **options)
    if of_v2 and peer.layout != "timm":  # windows and shifts are settled when it is built, whatever images come
        for stage, other in zip(ours.base_model.stages, theirs.encoder.layers, strict=True):
            for block, its in zip(stage.blocks, other.blocks, strict=True):
                block.shifted, block.rules = its.shift_size > 0, {"always_partition": True}
    return _TimmMaps(ours, theirs) if peer.layout == "timm" else ours


def _part(theirs: nn.Module, name: str) -> Any:
    """A module or a parameter of theirs by its name in the key table, see :func:`_state`."""
    name = re.sub(r"^layers\.(\d)", r"layers_\1", name) if hasattr(theirs, "layers_0") else name
    return attrgetter(name)(theirs)


def _keep_names(model: Any, revert: bool) -> None:
    """Have ``save_pretrained`` rename as it would have: transformers looks names up by the classes that it finds."""
    if not isinstance(model, PreTrainedModel):
        return
    if revert:
        if model.__dict__.pop("_renames_kept", False):
            del model._weight_conversions
    elif getattr(model, "_weight_conversions", None) is None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        found = get_model_conversion_mapping(model, add_legacy=False)
        kept = [step for step in found if not isinstance(step, PrefixChange)]
        model.__dict__.update(_weight_conversions=kept or None, _renames_kept=True)
