"""The layouts of the world as data: for each, one two-way table from its keys to ours.

A table names each key once, on either side; loading and exporting both read it. In a key,

    {trunk}   the prefix of the network, which depends on the kind of model (``Layout.trunks``)
    {i} {j}   stage and block, from 0
    {next}    i + 1: where merging opens the next stage, and the stage names of backbones, counted from 1
    {blocks}  2i + 1 and {merge} 2i + 2: torchvision's flat sequence of stages and mergings
    {last}    number of the last stage
    *         ``weight`` and ``bias``

and the other side is our key, for the same tensor; one of the classes below, for what has to be changed or computed; or
None, for what is dropped on purpose and never written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """What a state dict holds besides the trunk."""

    CLASSIFIER = "classifier"
    BASE = "model without a head"
    MIM = "masked image modeling (SimMIM)"
    BACKBONE = "backbone with a norm for each stage"
    SEGMENTER = "segmenter (UperNet)"


class Rows(NamedTuple):
    """One third of the rows of our fused projection."""

    key: str
    part: int  # 0 query, 1 key, 2 value


class QueryValue(NamedTuple):
    """Our biases of queries and values, the first and the last third of theirs; zeros between (torchvision's V2)."""

    query: str
    value: str


class Unfolded(NamedTuple):
    """A merging parameter whose last axis is in the order of ``nn.Unfold``: channel by channel over row-major taps."""

    key: str


class Buffer(Enum):
    """A tensor that follows from the sizes: dropped when read, computed anew when written."""

    INDEX = "relative position index, (N, N)"
    FLAT_INDEX = "relative position index, (N * N,)"
    MASK = "shift mask at the training image size, (nW, N, N)"
    COORDINATES = "offsets that the coordinate network of Swin V2 takes, (1, 2 Mh - 1, 2 Mw - 1, 2)"
    UNUSED = "final norm of transformers' backbones, which no output depends on; written as it is initialised, (C,)"


Target = str | Rows | QueryValue | Unfolded | Buffer | None


class Windows(Enum):
    """Which windows the layout's own code can build, apart from what it does on small maps."""

    ANY = "any window for each stage"
    ONE = "one window, square or rectangular, for all stages"
    ONE_SQUARE = "one square window for all stages"


class SmallMaps(Enum):
    """What the layout's own code does where a map is smaller than the window of its stage."""

    SHRINK = "the window shrinks, and its table stays whole"
    CUT = "window and table are cut to the map"
    CUT_TO_SHORTER = "it is cut to a square of the shorter side"
    CUT_TO_HEIGHT = "it is cut to a square of the height"
    PAD = "the map is padded"
    FAIL = "the forward pass fails"


@dataclass(frozen=True)
class Layout:
    """One way of naming the parameters of a Swin Transformer."""

    name: str  # what users call it
    about: str  # who writes it
    table: Mapping[str, Target]  # the keys, see the top of this file
    trunks: Mapping[Kind, tuple[str, ...]]  # kinds that it knows, and prefixes of the network; the first is written
    hosts: tuple[str, ...] = ()  # prefixes of a backbone in larger models, of which the rest is dropped on purpose
    aliases: tuple[tuple[str, str], ...] = ()  # older names, as expression and replacement, applied before the table
    writes_buffers: bool = True  # whether its files hold the buffers of the table
    shift_per_axis: bool = False  # which rule drops the shift there, see ``SwinHFConfig``
    pads_after_shift: bool = False  # whether it shifts a map before it pads it to whole windows, not after
    small_maps: SmallMaps = SmallMaps.FAIL  # what it does with those of a classifier
    windows: Windows = Windows.ONE_SQUARE  # which its code can build
    wrapper: str | None = None  # key under which a pickled file keeps the state dict
    file_name: str = "model.pth"  # of the weights in a folder
    family: str = "swin_hf"  # ``model_type`` of our models for it


_BLOCK = "swin.stages.{i}.blocks.{j}."
_QKV = _BLOCK + "attention.qkv.*"
_TABLE = _BLOCK + "attention.relative_position_bias_table"

# The convolutions of UperNet and of its auxiliary head; one is a weight and a batch normalisation.
_UPERNET = (
    *(f"decode_head.psp_modules.{scale}.1." for scale in range(4)),
    "decode_head.bottleneck.",
    *(f"decode_head.{name}_convs.{stage}." for name in ("lateral", "fpn") for stage in range(3)),
    "decode_head.fpn_bottleneck.",
    "auxiliary_head.convs.0.",
)
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _upernet(batch_norm: str, classifier: str) -> dict[str, Target]:
    """The table of the heads, where they call these two by other names than we do, who follow transformers."""
    table: dict[str, Target] = {f"{name}conv.weight": f"{name}conv.weight" for name in _UPERNET}
    for name in _UPERNET:
        table |= {f"{name}{batch_norm}.{part}": f"{name}batch_norm.{part}" for part in _BATCH_NORM}
    for head in ("decode_head.", "auxiliary_head."):
        table |= {f"{head}{classifier}.*": f"{head}classifier.*"}
    return table


def _block(prefix: str, attention: str, *mlp: str, index: Buffer = Buffer.INDEX) -> dict[str, Target]:
    """What layouts with Microsoft's names in a block call it, its attention and the two layers of its MLP."""
    attention = prefix + attention
    return {
        prefix + "norm1.*": _BLOCK + "norm1.*",
        attention + "relative_position_bias_table": _TABLE,
        attention + "relative_position_index": index,
        attention + "qkv.*": _QKV,
        attention + "proj.*": _BLOCK + "attention.proj.*",
        prefix + "norm2.*": _BLOCK + "norm2.*",
        prefix + mlp[0] + ".*": _BLOCK + "mlp.fc1.*",
        prefix + mlp[1] + ".*": _BLOCK + "mlp.fc2.*",
    }


# Our own names: the contract of model/modeling_swin_hf.py. Each is its own translation.
SWIN_HF: dict[str, Target] = _upernet("batch_norm", "classifier")
SWIN_HF |= {
    "{trunk}" + key.removeprefix("swin.") if key.startswith("swin.") else key: key
    for key in (
        "swin.embeddings.patch_embeddings.*",
        "swin.embeddings.norm.*",
        "swin.embeddings.mask_token",
        "swin.embeddings.position_embeddings",
        _BLOCK + "norm1.*",
        _TABLE,
        _QKV,
        _BLOCK + "attention.proj.*",
        _BLOCK + "norm2.*",
        _BLOCK + "mlp.fc1.*",
        _BLOCK + "mlp.fc2.*",
        "swin.stages.{i}.downsample.norm.*",
        "swin.stages.{i}.downsample.reduction.weight",
        "swin.norm.*",
        "hidden_states_norms.stem.*",
        "hidden_states_norms.stage{next}.*",
        "classifier.*",
        "decoder.0.*",
    )
}

# What a user calls a layout, and the finer names that it may turn out to be.
SAID = {
    "swin_hf": ("swin_hf",),
    "microsoft": ("microsoft", "timm-old"),
    "timm": ("timm", "timm-old", "microsoft"),  # before 0.9 it saved Microsoft's names, buffers and all
    "torchvision": ("torchvision",),
    "transformers": ("transformers", "transformers-4", "transformers-memory", "maskformer-swin"),
    "openmmlab": ("openmmlab",),
}

# models/swin_transformer.py and models/simmim.py of microsoft/Swin-Transformer.
_MICROSOFT_TRUNK: dict[str, Target] = {
    "{trunk}patch_embed.proj.*": "swin.embeddings.patch_embeddings.*",
    "{trunk}patch_embed.norm.*": "swin.embeddings.norm.*",
    **_block("{trunk}layers.{i}.blocks.{j}.", "attn.", "mlp.fc1", "mlp.fc2"),
    "{trunk}layers.{i}.blocks.{j}.attn_mask": Buffer.MASK,
    "{trunk}norm.*": "swin.norm.*",
}
MICROSOFT: dict[str, Target] = {
    **_MICROSOFT_TRUNK,
    "{trunk}absolute_pos_embed": "swin.embeddings.position_embeddings",
    "{trunk}mask_token": "swin.embeddings.mask_token",
    "{trunk}layers.{i}.downsample.norm.*": "swin.stages.{i}.downsample.norm.*",
    "{trunk}layers.{i}.downsample.reduction.weight": "swin.stages.{i}.downsample.reduction.weight",
    "{trunk}norm{i}.*": "hidden_states_norms.stage{next}.*",
    "head.*": "classifier.*",
    "decoder.0.*": "decoder.0.*",
}

# timm/models/swin_transformer.py since 0.9: merging opens a stage, the classifier is head.fc, no buffers are saved.
TIMM: dict[str, Target] = {
    **_MICROSOFT_TRUNK,
    "{trunk}layers.{next}.downsample.norm.*": "swin.stages.{i}.downsample.norm.*",
    "{trunk}layers.{next}.downsample.reduction.weight": "swin.stages.{i}.downsample.reduction.weight",
    "head.fc.*": "classifier.*",
}

# torchvision/models/swin_transformer.py: stages and mergings take turns in one sequence.
TORCHVISION: dict[str, Target] = {
    "{trunk}features.0.0.*": "swin.embeddings.patch_embeddings.*",
    "{trunk}features.0.2.*": "swin.embeddings.norm.*",
    **_block("{trunk}features.{blocks}.{j}.", "attn.", "mlp.0", "mlp.3", index=Buffer.FLAT_INDEX),
    "{trunk}features.{merge}.norm.*": "swin.stages.{i}.downsample.norm.*",
    "{trunk}features.{merge}.reduction.weight": "swin.stages.{i}.downsample.reduction.weight",
    "{trunk}norm.*": "swin.norm.*",
    "head.*": "classifier.*",
}

# transformers/models/swin: the names of 4.x, which 5.x still writes, and those that 5.x holds in memory.
_HF_BLOCK = "{trunk}encoder.layers.{i}.blocks.{j}."
_TRANSFORMERS_COMMON: dict[str, Target] = {
    "{trunk}embeddings.patch_embeddings.projection.*": "swin.embeddings.patch_embeddings.*",
    "{trunk}embeddings.norm.*": "swin.embeddings.norm.*",
    "{trunk}embeddings.mask_token": "swin.embeddings.mask_token",
    "{trunk}embeddings.position_embeddings": "swin.embeddings.position_embeddings",
    _HF_BLOCK + "layernorm_before.*": _BLOCK + "norm1.*",
    _HF_BLOCK + "layernorm_after.*": _BLOCK + "norm2.*",
    "{trunk}encoder.layers.{i}.downsample.norm.*": "swin.stages.{i}.downsample.norm.*",
    "{trunk}encoder.layers.{i}.downsample.reduction.weight": "swin.stages.{i}.downsample.reduction.weight",
    "{trunk}layernorm.*": "swin.norm.*",
    "classifier.*": "classifier.*",
    "decoder.0.*": "decoder.0.*",
}
_TRANSFORMERS_DISK: dict[str, Target] = {
    **_TRANSFORMERS_COMMON,
    _HF_BLOCK + "attention.self.relative_position_bias_table": _TABLE,
    _HF_BLOCK + "attention.self.relative_position_index": Buffer.INDEX,
    _HF_BLOCK + "attention.self.query.*": Rows(_QKV, 0),
    _HF_BLOCK + "attention.self.key.*": Rows(_QKV, 1),
    _HF_BLOCK + "attention.self.value.*": Rows(_QKV, 2),
    _HF_BLOCK + "attention.output.dense.*": _BLOCK + "attention.proj.*",
    _HF_BLOCK + "intermediate.dense.*": _BLOCK + "mlp.fc1.*",
    _HF_BLOCK + "output.dense.*": _BLOCK + "mlp.fc2.*",
}
_NORMS: dict[str, Target] = {
    "hidden_states_norms.stem.*": "hidden_states_norms.stem.*",
    "hidden_states_norms.stage{next}.*": "hidden_states_norms.stage{next}.*",
}
TRANSFORMERS_4: dict[str, Target] = {**_TRANSFORMERS_DISK, **_NORMS}
TRANSFORMERS: dict[str, Target] = {**TRANSFORMERS_4, "swin.layernorm.*": Buffer.UNUSED}
TRANSFORMERS_MEMORY: dict[str, Target] = {
    **_TRANSFORMERS_COMMON,
    _HF_BLOCK + "attention.relative_position_bias.relative_position_bias_table": _TABLE,
    _HF_BLOCK + "attention.relative_position_bias.relative_position_index": Buffer.FLAT_INDEX,
    _HF_BLOCK + "attention.q_proj.*": Rows(_QKV, 0),
    _HF_BLOCK + "attention.k_proj.*": Rows(_QKV, 1),
    _HF_BLOCK + "attention.v_proj.*": Rows(_QKV, 2),
    _HF_BLOCK + "attention.o_proj.*": _BLOCK + "attention.proj.*",
    _HF_BLOCK + "mlp.fc1.*": _BLOCK + "mlp.fc1.*",
    _HF_BLOCK + "mlp.fc2.*": _BLOCK + "mlp.fc2.*",
    **_NORMS,
    "swin.layernorm.*": Buffer.UNUSED,
}
MASKFORMER_SWIN: dict[str, Target] = {
    **_TRANSFORMERS_DISK,
    "model.layernorm.*": Buffer.UNUSED,
    "hidden_states_norms.{i}.*": "hidden_states_norms.stage{next}.*",
}

# swin_transformer.py of mmpretrain, mmdetection and mmsegmentation; merging goes through nn.Unfold there.
_MM_BLOCK = "{trunk}stages.{i}.blocks.{j}."
OPENMMLAB: dict[str, Target] = {
    "{trunk}patch_embed.projection.*": "swin.embeddings.patch_embeddings.*",
    "{trunk}patch_embed.norm.*": "swin.embeddings.norm.*",
    "{trunk}absolute_pos_embed": "swin.embeddings.position_embeddings",
    **_block(_MM_BLOCK, "attn.w_msa.", "ffn.layers.0.0", "ffn.layers.1"),
    _MM_BLOCK + "attn_mask": None,  # files that were converted from Microsoft's
    _MM_BLOCK + "attn.attn_mask": None,  # saved before version 3 of the module
    "{trunk}stages.{i}.downsample.norm.*": Unfolded("swin.stages.{i}.downsample.norm.*"),
    "{trunk}stages.{i}.downsample.reduction.weight": Unfolded("swin.stages.{i}.downsample.reduction.weight"),
    "{trunk}norm{last}.*": "swin.norm.*",
    "{trunk}norm{i}.*": "hidden_states_norms.stage{next}.*",
    "head.fc.*": "classifier.*",
    **_upernet("bn", "conv_seg"),
}

_PLAIN = {Kind.CLASSIFIER: ("",), Kind.BASE: ("",)}
_MICROSOFT_TRUNKS = {**_PLAIN, Kind.MIM: ("encoder.",), Kind.BACKBONE: ("backbone.", "")}
_DETECTORS = ("backbone.",)
_HF_BACKBONES = (
    "backbone.",  # UperNet
    "pixel_level_module.encoder.", "model.pixel_level_module.encoder.",  # Mask2Former
    "model.backbone.conv_encoder.model.", "model.backbone.model.",  # the DETR family
)  # fmt: skip
_TRANSFORMERS_HOSTS = tuple(host + trunk for host in _HF_BACKBONES for trunk in ("", "swin."))


def transformers_trunks(prefix: str, *backbone: str) -> dict[Kind, tuple[str, ...]]:
    """Prefixes of the network in its classes: one where a head is around it, and those of a backbone."""
    return {Kind.CLASSIFIER: (prefix,), Kind.MIM: (prefix,), Kind.BACKBONE: backbone, Kind.BASE: ("",)}


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "swin_hf", "this package; also its Lightning checkpoints", SWIN_HF,
            {**transformers_trunks("swin.", "swin."), Kind.SEGMENTER: ("swin.",)},
            windows=Windows.ANY, small_maps=SmallMaps.SHRINK, file_name="model.safetensors",
        ),
        Layout(
            "timm", "timm since 0.9", TIMM, _PLAIN,
            writes_buffers=False, shift_per_axis=True, pads_after_shift=True, windows=Windows.ANY,
            small_maps=SmallMaps.CUT, file_name="model.safetensors",
        ),
        Layout(
            "microsoft", "microsoft/Swin-Transformer, its SimMIM files and its detection and segmentation forks",
            MICROSOFT, _MICROSOFT_TRUNKS, hosts=_DETECTORS, small_maps=SmallMaps.CUT_TO_SHORTER, wrapper="model",
        ),
        Layout(
            "timm-old", "Microsoft's names without buffers: timm before 0.9, and files that were stripped of them",
            MICROSOFT, _MICROSOFT_TRUNKS, hosts=_DETECTORS, writes_buffers=False, small_maps=SmallMaps.CUT_TO_SHORTER,
        ),
        Layout(
            "torchvision", "torchvision.models.swin_t, swin_s, swin_b", TORCHVISION, _PLAIN,
            shift_per_axis=True, small_maps=SmallMaps.PAD, windows=Windows.ONE,
        ),
        Layout(
            "transformers",
            "Swin classes of transformers 5 as saved; UperNet, Mask2Former and other hosts of SwinBackbone",
            TRANSFORMERS, transformers_trunks("swin.", "", "swin."), hosts=_TRANSFORMERS_HOSTS,
            writes_buffers=False, file_name="model.safetensors",
        ),
        Layout(
            "transformers-4", "Swin classes of transformers 4 as saved, with their index buffers",
            TRANSFORMERS_4, transformers_trunks("swin.", ""), hosts=_TRANSFORMERS_HOSTS,
            file_name="model.safetensors",
        ),
        Layout(
            "transformers-memory", "state_dict() of transformers 5, which Lightning checkpoints of its models hold",
            TRANSFORMERS_MEMORY, transformers_trunks("swin.", "swin."), hosts=_TRANSFORMERS_HOSTS,
            writes_buffers=False,
        ),
        Layout(
            "maskformer-swin", "MaskFormerSwinBackbone of transformers, alone or in MaskFormer",
            MASKFORMER_SWIN, {Kind.BACKBONE: ("model.",)},
            hosts=("model.pixel_level_module.encoder.model.", "pixel_level_module.encoder.model."),
            file_name="model.safetensors",
        ),
        Layout(
            "openmmlab", "mmpretrain, mmdetection and mmsegmentation", OPENMMLAB,
            {**dict.fromkeys((*_PLAIN, Kind.BACKBONE), ("backbone.", "")), Kind.SEGMENTER: ("backbone.",)},
            hosts=_DETECTORS, aliases=((r"^((?:backbone\.)?)norm\.", r"\g<1>norm{last}."),),
            wrapper="state_dict",
        ),
    )
}  # fmt: skip
