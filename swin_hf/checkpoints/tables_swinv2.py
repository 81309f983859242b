"""The layouts of Swin V2: V1's tables, with other rows for attention and for what follows from the windows."""

from collections.abc import Mapping
from dataclasses import replace

from swin_hf.checkpoints.tables import (
    LAYOUTS,
    Buffer,
    Layout,
    QueryValue,
    Rows,
    SmallMaps,
    Target,
    Unfolded,
    transformers_trunks,
)

_BLOCK = "swin.stages.{i}.blocks.{j}."
_ATTENTION = _BLOCK + "attention."


def _rows(prefix: str, network: str = "cpb_mlp") -> dict[str, Target]:
    """What all layouts have in an attention layer, under a prefix of theirs."""
    return {
        f"{prefix}logit_scale": _ATTENTION + "logit_scale",
        f"{prefix}{network}.0.*": _ATTENTION + "cpb_mlp.0.*",
        f"{prefix}{network}.2.weight": _ATTENTION + "cpb_mlp.2.weight",
        f"{prefix}relative_coords_table": Buffer.COORDINATES,
    }


def _biases(prefix: str) -> dict[str, Target]:
    return {
        f"{prefix}qkv.weight": _ATTENTION + "qkv.weight",
        f"{prefix}q_bias": _ATTENTION + "q_bias",
        f"{prefix}v_bias": _ATTENTION + "v_bias",
    }


def _table(name: str, attention: Mapping[str, Target]) -> dict[str, Target]:
    """V1's table with these rows in place of its bias table and its projection of queries, keys and values."""
    table: dict[str, Target] = {}
    for key, target in LAYOUTS[name].table.items():
        ours = target.key if isinstance(target, Rows) else target
        if ours == _ATTENTION + "relative_position_bias_table":
            table.update(attention)
        elif ours != _ATTENTION + "qkv.*":
            table[key] = target
    return table


_HF = "{trunk}encoder.layers.{i}.blocks.{j}.attention.self."
_HF_ATTENTION: dict[str, Target] = {
    **_rows(_HF, "continuous_position_bias_mlp"),
    f"{_HF}query.weight": Rows(_ATTENTION + "qkv.weight", 0),
    f"{_HF}key.weight": Rows(_ATTENTION + "qkv.weight", 1),
    f"{_HF}value.weight": Rows(_ATTENTION + "qkv.weight", 2),
    f"{_HF}query.bias": _ATTENTION + "q_bias",
    f"{_HF}value.bias": _ATTENTION + "v_bias",
}
_MM = "{trunk}stages.{i}.blocks.{j}.attn.w_msa."
_TV = "{trunk}features.{blocks}.{j}.attn."
_MS = "{trunk}layers.{i}.blocks.{j}.attn."
_QKV: dict[str, Target] = {
    _TV + "qkv.weight": _ATTENTION + "qkv.weight",
    _TV + "qkv.bias": QueryValue(_ATTENTION + "q_bias", _ATTENTION + "v_bias"),
}
_EXTRA: dict[str, Target] = {"{trunk}stages.{i}.blocks.{j}.norm3.*": _BLOCK + "norm3.*"}  # Microsoft released none
_EARLY = ((r"\.rpe_mlp\.", ".cpb_mlp."),)  # the first files of SimMIM


def _swin_hf() -> dict[str, Target]:
    """Our own names, in which nothing that follows from the windows is stored."""
    prefix = "{trunk}stages.{i}.blocks.{j}.attention."
    rows = _table("swin_hf", {**_rows(prefix), **_biases(prefix), **_EXTRA}).items()
    return {key: target for key, target in rows if not isinstance(target, Buffer)}


def _openmmlab() -> dict[str, Target]:
    """Its merging opens the next stage, and its norm comes after the channels have lost their order."""
    table = _table("openmmlab", {**_rows(_MM), **_biases(_MM), **_EXTRA})
    return {key: target for key, target in table.items() if ".downsample." not in key} | {
        "{trunk}stages.{next}.downsample.norm.*": "swin.stages.{i}.downsample.norm.*",
        "{trunk}stages.{next}.downsample.reduction.weight": Unfolded("swin.stages.{i}.downsample.reduction.weight"),
    }


def _transformers(name: str) -> Layout:
    """Its backbone has neither norms for its maps nor a norm that nothing goes through."""
    rows = _table(name, _HF_ATTENTION).items()
    table = {key: ours for key, ours in rows if "hidden_states_norms" not in key and ours is not Buffer.UNUSED}
    trunks = transformers_trunks("swinv2.", "")
    return replace(LAYOUTS[name], table=table, trunks=trunks, small_maps=SmallMaps.CUT_TO_HEIGHT)


_MS_TABLE = _table("microsoft", {**_rows(_MS), **_biases(_MS)})

LAYOUTS_V2: dict[str, Layout] = {
    layout.name: replace(layout, family="swinv2_hf")
    for layout in (
        replace(LAYOUTS["swin_hf"], table=_swin_hf()),
        replace(LAYOUTS["timm"], table=_table("timm", {**_rows(_MS), **_biases(_MS)})),
        replace(LAYOUTS["microsoft"], table=_MS_TABLE, aliases=_EARLY),
        replace(LAYOUTS["timm-old"], table=_MS_TABLE, aliases=_EARLY),
        replace(LAYOUTS["torchvision"], table=_table("torchvision", {**_rows(_TV), **_QKV})),
        _transformers("transformers"),  # also those in memory
        _transformers("transformers-4"),
        replace(LAYOUTS["openmmlab"], table=_openmmlab(), small_maps=SmallMaps.CUT),  # it has a window for each stage
    )
}
