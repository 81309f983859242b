"""Our backbone under an existing model of transformers: the same outputs, the same files, another engine."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from swin_hf.checkpoints import derive
from swin_hf.checkpoints.detect import count_blocks
from swin_hf.checkpoints.tables import LAYOUTS, Kind
from swin_hf.checkpoints.translate import Place, expand, our_key, to_ours, to_theirs
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.modeling_swin_hf import SwinHFBackbone, SwinHFModel
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
    "FeatureListNet": Peer("timm", Kind.BASE, has_norm=False),  # what timm makes of a Swin in a TimmBackbone
}


def replace_backbone(model: Any, revert: bool = False) -> Any:
    """Put our Swin in the place of every Swin in a model of transformers.

    The model computes the same, and ``state_dict``, ``load_state_dict`` and ``save_pretrained`` keep the names and
    files that it had, so that everybody can load what it saves; its parameters are ours, an optimiser has to be made
    anew. In training our stochastic depth drops MLP branches too, as Microsoft's does and transformers' does not.

    Args:
        model: Any model that holds a ``SwinBackbone`` (UperNet, Mask2Former, OneFormer, the DETR family, Grounding
            DINO, ...), ``MaskFormerSwinBackbone``, ``SwinModel``, ``DonutSwinModel``, or a Swin of timm in a
            ``TimmBackbone``; or one of these itself.
        revert: Whether to go back: the modules that were there, with the weights as they are now, bit for bit where
            they were not trained.

    Returns:
        The model; what it is replaced by, where it is itself a Swin.

    Raises:
        ValueError: If it holds none of them, or one that cannot be expressed; the model is as it was.
    """
    if revert:
        swaps = [(module, module.replaced.restore(module)) for module in model.modules() if _is_ours(module)]
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


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("replaced"), _Replaced)


def _swins(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every Swin of another library, with its name; none that is a part of another."""
    found: list[str] = []
    for name, module in model.named_modules():
        is_theirs = type(module).__module__.startswith(("transformers.", "timm."))
        if not is_theirs or type(module).__name__ not in PEERS or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if type(module).__name__ != "FeatureListNet" or any(
            "relative_position_bias_table" in k for k in _state(module)
        ):
            found.append(name)
            yield name, module


def _state(module: nn.Module) -> dict[str, Tensor]:
    """State dict under the names of the key table: timm flattens ``layers.0`` to ``layers_0``."""
    return {re.sub(r"^layers_(\d)", r"layers.\1", key): tensor for key, tensor in module.state_dict().items()}


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
        maps: Any = record.reshaped_hidden_states  # B, C, H, W
        return [maps[number].permute(0, 2, 3, 1).contiguous() for number in numbers]


class _Replaced:
    """The module that was there, and how its state dict and ours become each other; hooks of our module."""

    def __init__(self, theirs: nn.Module, place: Place, config: SwinHFConfig, ours: set[str], is_bare: bool) -> None:
        self.theirs = (theirs,)  # in a tuple it is no part of the model
        self.place, self.config = place, config
        self.bare = "swin." if is_bare else ""  # what our names begin with in the tables and not in the module
        self.names = list(theirs.state_dict())
        moved = {entry.key for entry in expand(place, config.depths) if our_key(entry.target) in ours}
        # What no output depends on, and buffers: as they were.
        self.kept = {key: tensor.clone() for key, tensor in _state(theirs).items() if key not in moved}

    def to_theirs(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under their names, in their order."""
        like = next(iter(state.values()))
        found = to_theirs({self.bare + key: tensor for key, tensor in state.items()}, self.place, self.config)
        for key, tensor in self.kept.items():
            found[key] = tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
        return {name: found[re.sub(r"^layers_(\d)", r"layers.\1", name)] for name in self.names}

    def on_save(self, module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        """Give the keys below ``prefix`` their names."""
        ours = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        state.update({prefix + key: tensor for key, tensor in self.to_theirs(ours).items()})

    def on_load(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Give the keys below ``prefix`` our names, where they have theirs."""
        theirs = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        if not set(theirs) <= set(self.names):
            return  # ours already, or a mixture that load_state_dict will complain of
        for key in theirs:
            del state[prefix + key]
        theirs = {re.sub(r"^layers_(\d)", r"layers.\1", key): tensor for key, tensor in theirs.items()}
        self.kept.update({key: theirs.pop(key) for key in list(theirs) if key in self.kept})
        ours = to_ours(theirs, self.place, self.config.depths).state
        state.update({prefix + key.removeprefix(self.bare): tensor for key, tensor in ours.items()})

    def free(self) -> None:
        """Let go of the weights that were copied into ours."""
        for part in self.theirs[0].modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    def restore(self, module: nn.Module) -> nn.Module:
        """The module that was there, with the weights of ours."""
        (theirs,) = self.theirs
        state = module.state_dict()
        theirs.load_state_dict(state, assign=True)
        return theirs.to(next(iter(state.values())).device).train(module.training)


def _replacement(name: str, theirs: Any) -> Any:
    """Our module with the weights of theirs."""
    peer, state = PEERS[type(theirs).__name__], _state(theirs)
    place = Place(LAYOUTS[peer.layout], peer.kind, "", peer.trunk)
    try:
        if peer.layout == "timm":
            depths = count_blocks(state.keys(), place.layout, "")
            fields = derive.fields_from_shapes(to_ours(state, place, depths), depths, peer.kind, None)
            pixels = theirs.patch_embed.img_size
            fields |= {"image_size": pixels if pixels is None else list(pixels), "shift_per_axis": True}
            config = SwinHFConfig(**fields)
        else:
            config = SwinHFConfig(**derive.told_by({**theirs.config.to_dict(), "model_type": "swin"}))
        if peer.kind is Kind.BACKBONE:
            config.out_features = list(theirs.out_features)
        translated = to_ours(state, place, config.depths).state
        with torch.device("meta"):
            ours = _build(peer, config, theirs)
        is_bare = isinstance(ours, SwinHFModel)
        names = {("swin." if is_bare else "") + key: key for key in ours.state_dict()}
        own = {key: translated[long].clone() for long, key in names.items()}
        ours.load_state_dict(own, assign=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name or 'the model'}, a {type(theirs).__name__}, cannot be replaced: {error}") from error
    replaced = _Replaced(theirs, place, config, set(names), is_bare)
    frozen = {our_key(e.target) for e in expand(place, config.depths) if not _trains(theirs, e.key)}
    for long, key in names.items():
        ours.get_parameter(key).requires_grad_(long not in frozen)
    ours.replaced = replaced
    ours.register_state_dict_post_hook(partial(replaced.on_save))  # a bound method takes no attributes
    ours.register_load_state_dict_pre_hook(partial(replaced.on_load))
    return ours.train(theirs.training)


def _build(peer: Peer, config: SwinHFConfig, theirs: Any) -> Any:
    if peer.kind is Kind.BACKBONE:
        return SwinHFBackbone(config)
    options = {"add_pooling_layer": getattr(theirs, "pooler", None) is not None, "add_final_norm": peer.has_norm}
    embeddings = getattr(theirs, "embeddings", None)
    swin = SwinHFModel(config, use_mask_token=getattr(embeddings, "mask_token", None) is not None, **options)
    return _TimmMaps(swin, theirs) if peer.layout == "timm" else swin


def _trains(theirs: nn.Module, key: str) -> bool:
    try:
        return theirs.get_parameter(re.sub(r"^layers\.(\d)", r"layers_\1", key)).requires_grad
    except AttributeError:
        try:
            return theirs.get_parameter(key).requires_grad
        except AttributeError:
            return True


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
