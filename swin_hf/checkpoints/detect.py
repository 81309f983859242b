"""Recognise a state dict: its layout, the kind of model, the prefixes, the blocks of each stage."""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from swin_hf.checkpoints.tables import LAYOUTS, SAID, Kind, Layout
from swin_hf.checkpoints.tables_swinv2 import LAYOUTS_V2
from swin_hf.checkpoints.translate import Place, expand, listed, our_key
from swin_hf.text import one_line

_PATCH, _QKV = "swin.embeddings.patch_embeddings.weight", "swin.stages.0.blocks.0.attention.qkv.weight"
_NORM1 = "swin.stages.{i}.blocks.{j}.norm1.*"

_V2 = re.compile(r"\.(cpb_mlp|rpe_mlp|continuous_position_bias_mlp)\.\d")

# Keys of other architectures, so that a refusal can name them. The first that matches is named.
_STRANGERS = (
    (r"\.attn\.meta_mlp\.", "swinv2_cr of timm"),
    (r"\.lora_[AB]\.", "a network with LoRA adapters; the folder model/ of the run holds them merged"),
    (r"(^|\.)layer1\.0\.conv1\.weight$|(^|\.)encoder\.stages\.0\.layers\.0\.shortcut\.", "ResNet"),
    (r"(^|\.)stages\.\d\.(blocks\.)?\d\.(conv_dw|gamma)|\.dwconv\.weight$", "ConvNeXt"),
    (r"(^|\.)distillation_token$|(^|\.)dist_token$", "DeiT"),
    (r"(^|\.)(cls_token|class_token|class_embedding)$", "Vision Transformer (ViT)"),
    (r"(^|\.)conv_stem\.weight$|(^|\.)features\.0\.0\.weight$", "a convolutional network such as EfficientNet"),
    (r"(^|\.)(wte|embed_tokens|word_embeddings)\.weight$", "a language model"),
)


def detect(keys: Collection[str], layout: str | None = None) -> Place:
    """Where the network is in a state dict of these keys, and what it is; a named layout is checked.

    Raises:
        ValueError: If it is not a Swin Transformer (the message says what it looks like), if it holds several, or if
            the named layout is unknown or not that of the keys.
    """
    if not keys:
        raise ValueError("the state dict is empty; give the file that holds the weights")
    if layout is not None and layout not in (*SAID, *LAYOUTS):
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(SAID)}")
    layouts = LAYOUTS_V2 if is_v2(keys) else LAYOUTS
    candidates = layouts if layout is None else SAID.get(layout, (layout,))
    leads = {name: _leads(keys, layouts[name]) for name in candidates if name in layouts}
    matching = [name for name, found in leads.items() if found]
    if not matching:
        if layout is not None:
            raise ValueError(
                f"the keys are not those of the {layout} layout (there is {listed(keys)}); leave layout= out to have "
                "it detected"
            )
        likely = (name for pattern, name in _STRANGERS if any(re.search(pattern, key) for key in keys))
        looks = next((f"it looks like {name}" for name in likely), f"there is {listed(keys)}")
        raise ValueError(f"this is not a Swin Transformer: {looks}; its layouts are {', '.join(SAID)}")
    name = matching[0] if len(matching) == 1 else _choose(keys, matching)
    if name not in matching:
        raise ValueError(f"the keys are those of the {name} layout, not {layout}; leave layout= out to detect it")
    chosen = layouts[name]
    lead, *others = leads[chosen.name]
    if others:
        raise ValueError(
            f"the state dict holds {1 + len(others)} networks, under {', '.join(map(repr, [lead, *others]))}; "
            "give one of them"
        )
    return _place(keys, chosen, lead)


# Types in a config.json, and beginnings of timm's names, of what is read; timm's swin_s3 is the same network.
MODEL_TYPES = ("swin", "swin_hf", "maskformer-swin", "swinv2", "swinv2_hf")
_TIMM_NAMES = re.compile(r"swin_|swinv2_(?!cr_)")


def refuse_strangers(config: Mapping[str, Any], name: str) -> None:
    """Refuse, with a ValueError, the ``config.json`` of a model that neither is a Swin nor holds one."""
    kind = config.get("architecture") or config.get("model_type")
    if not isinstance(kind, str) or _holds_swin(config):
        return
    other = "swinv2_cr of timm" if kind.startswith("swinv2_cr") else kind
    raise ValueError(
        f"{name} is not a Swin Transformer that is read here: its config.json says {one_line(other, 60)}; known are"
        f" model_type {', '.join(MODEL_TYPES)}, larger models of transformers around one of them, and timm's swin_*,"
        " swin_s3_* and swinv2_*"
    )


def _holds_swin(config: Mapping[str, Any]) -> bool:
    if config.get("model_type") in MODEL_TYPES:
        return True
    if any(_TIMM_NAMES.match(str(config.get(key) or "")) for key in ("architecture", "backbone")):
        return True
    return any(isinstance(part, Mapping) and _holds_swin(part) for part in config.values())


def is_v2(keys: Collection[str]) -> bool:
    """Whether the keys are those of a Swin V2, in any layout."""
    return any(_V2.search(key) for key in keys)


def _leads(keys: Collection[str], layout: Layout) -> list[str]:
    """Prefixes under which both the patch embedding and the first attention of a layout are found."""
    theirs = {our_key(entry.target): entry.key for entry in reversed(expand(Place(layout, Kind.CLASSIFIER, [1])))}
    patch, qkv = theirs[_PATCH], theirs[_QKV]  # of several, the first
    leads = [key.removesuffix(patch) for key in keys if key == patch or key.endswith("." + patch)]
    return sorted(lead for lead in leads if lead + qkv in keys)


def _choose(keys: Collection[str], matching: Sequence[str]) -> str:
    """Tell apart the layouts that share the names of patch embedding and attention."""
    if "microsoft" in matching:
        merges_early = any(re.search(r"(^|\.)layers\.0\.downsample\.", key) for key in keys)
        merges_late = any(re.search(r"(^|\.)layers\.1\.downsample\.", key) for key in keys) and not merges_early
        if merges_late or any(key.endswith("head.fc.weight") for key in keys):
            return "timm"
        has_buffers = any(key.endswith(("relative_position_index", "attn_mask")) for key in keys)
        return "microsoft" if has_buffers else "timm-old"
    if any(re.search(r"(^|\.)hidden_states_norms\.\d", key) for key in keys):
        return "maskformer-swin"
    return "transformers-4" if any(key.endswith("relative_position_index") for key in keys) else "transformers"


def _place(keys: Collection[str], layout: Layout, lead: str) -> Place:
    """Kind, blocks of each stage and prefixes."""
    depths = count_blocks(keys, layout, lead)
    lines = expand(Place(layout, Kind.CLASSIFIER, depths, "", lead))  # of whatever kind it is
    rows = [(line.key.rpartition(".")[0], our_key(line.target) or "") for line in lines]
    modules = {key.rpartition(".")[0] for key in keys}

    def theirs(part: str) -> set[str]:
        return {key for key, ours in rows if ours.startswith(part)}

    norms = theirs("hidden_states_norms.")
    outside = modules - theirs("swin.")  # whose blocks have a norm1 each
    norms_found = {norm for norm in norms if any(module.endswith(norm) for module in outside)}
    # The one norm of an OpenMMLab backbone is the final one of a classifier that lost its head.
    is_headless = layout.name == "openmmlab" and norms_found == {f"{lead}norm{len(depths) - 1}"}
    is_headless = is_headless and all(key.startswith(lead) for key in keys)
    if modules & theirs("decode_head.fpn_bottleneck.") and Kind.SEGMENTER in layout.trunks:
        kind = Kind.SEGMENTER
    elif any(key.endswith("mask_token") for key in keys) and Kind.MIM in layout.trunks:
        kind = Kind.MIM
    elif modules & theirs("classifier."):
        kind = Kind.CLASSIFIER
    elif norms_found and not is_headless:
        kind = Kind.BACKBONE
    elif Kind.BACKBONE in layout.trunks and not norms and not modules & theirs("swin.norm."):
        kind = Kind.BACKBONE  # of transformers' V2, which has no norms at all
    else:
        kind = Kind.BASE if lead in layout.trunks.get(Kind.BASE, ()) else Kind.CLASSIFIER
    if kind not in layout.trunks:
        kind = next(iter(layout.trunks))
    trunks = sorted((trunk for trunk in layout.trunks[kind] if lead.endswith(trunk)), key=len)
    if not trunks:
        expected = " or ".join(map(repr, layout.trunks[kind]))
        raise ValueError(
            f"the names begin with {lead!r}, but those of a {kind.value} of the {layout.name} layout begin with"
            f" {expected}; rename the keys, or take the part of the state dict that holds it"
        )
    host = lead.removesuffix(trunks[-1])
    if host and lead not in layout.hosts:
        raise ValueError(
            f"the names begin with {lead!r}, which is not a place of a Swin in the {layout.name} layout; give the"
            " state dict of the network alone"
        )
    return Place(layout, kind, depths, host, trunks[-1])


def count_blocks(keys: Collection[str], layout: Layout, lead: str) -> list[int]:
    """Count stages and blocks by the first norm of each block."""
    row = next(key for key, target in layout.table.items() if target == _NORM1).replace("*", "weight")

    def blocks(stage: int) -> int:
        names = {"trunk": lead, "i": stage, "next": stage + 1, "blocks": 2 * stage + 1}
        return next(block for block in itertools.count() if row.format_map(names | {"j": block}) not in keys)

    return list(itertools.takewhile(bool, map(blocks, itertools.count())))
