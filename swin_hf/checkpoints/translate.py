"""Translate state dicts between the keys of a layout and ours, and say where its code computes something else."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swin_hf.checkpoints.tables import Buffer, Kind, Layout, QueryValue, Rows, SmallMaps, Target, Unfolded
from swin_hf.model.configuration_swin_hf import SwinHFConfig, as_pair
from swin_hf.model.configuration_swinv2_hf import SwinV2HFConfig
from swin_hf.model.windows import Pair, log_spaced_offsets, relative_position_index, shift_mask, window_geometry

State = Mapping[str, Tensor]

SHOWN = 20  # keys of a list in an error


class Place(NamedTuple):
    """Where a network is in a state dict, and what it is."""

    layout: Layout
    kind: Kind
    depths: Sequence[int]  # blocks of each stage
    host: str = ""  # prefix of the larger model around it
    trunk: str = ""  # prefix of the network within the host


class Entry(NamedTuple):
    """One line of a table, with stage and block filled in."""

    key: str  # theirs
    target: Target  # with our concrete key
    stage: int
    block: int


class Translation(NamedTuple):
    """A foreign state dict in our names."""

    place: Place
    state: dict[str, Tensor]  # under our keys
    buffers: dict[tuple[Buffer, int, int], Tensor]  # computed tensors that were there, by stage and block
    dropped: list[str]  # their keys that were left out on purpose


def expand(place: Place) -> list[Entry]:
    """Write the table of a layout out for a network, row by row."""
    depths, entries = place.depths, []
    for key, target in place.layout.table.items():
        is_staged = any(name in key for name in ("{i}", "{next}", "{blocks}", "{merge}"))
        counts = depths if "{j}" in key else [1] * (len(depths) if is_staged else 1)
        for stage, block in ((stage, block) for stage, count in enumerate(counts) for block in range(count)):
            names = {"trunk": place.trunk, "i": stage, "j": block, "last": len(depths) - 1}
            names |= {"next": stage + 1, "blocks": 2 * stage + 1, "merge": 2 * stage + 2}
            for suffix in ("weight", "bias") if key.endswith("*") else ("",):
                theirs = place.host + key.format_map(names).removesuffix("*") + suffix
                entries.append(Entry(theirs, _fill(target, names, suffix), stage, block))
    return entries


def _fill(target: Target, names: Mapping[str, object], suffix: str) -> Target:
    """Put stage, block and suffix into our side of a row."""
    if isinstance(target, str):
        return target.format_map(names).removesuffix("*") + (suffix if target.endswith("*") else "")
    if isinstance(target, Rows | Unfolded | QueryValue):
        parts: list[Any] = [_fill(part, names, suffix) if isinstance(part, str) else part for part in target]
        return type(target)(*parts)
    return target


def our_key(target: Target) -> str | None:
    """Our key of a target, the first of two, if there is one."""
    if isinstance(target, Rows | Unfolded | QueryValue):
        return target[0]
    return target if isinstance(target, str) else None


def their_names(place: Place, ours: Collection[str]) -> list[str]:
    """Names that a layout has for some of our keys; our own where it has none."""
    return [entry.key for entry in expand(place) if our_key(entry.target) in ours] or list(ours)


def to_ours(state: State, place: Place) -> Translation:
    """Translate a state dict of a layout into our names; ValueError for keys that its table does not have."""
    targets = {entry.key: entry for entry in expand(place) if _belongs(entry, place.kind)}
    translation = Translation(place, {}, {}, [])
    parts: dict[str, dict[int, Tensor]] = {}
    unknown: list[str] = []
    lead = place.host + place.trunk
    is_part = place.kind is Kind.BACKBONE and lead in place.layout.hosts  # of a larger model, whose other keys go
    for written, tensor in state.items():
        key = written
        for pattern, replacement in place.layout.aliases:
            key = re.sub(pattern, replacement.format(last=len(place.depths) - 1), key)
        if key not in targets:
            (translation.dropped if is_part and not key.startswith(lead) else unknown).append(written)
            continue
        target = targets[key].target
        if isinstance(target, str):
            translation.state[target] = tensor
        elif isinstance(target, Unfolded):
            translation.state[target.key] = fold(tensor)
        elif isinstance(target, QueryValue):
            query, _, value = tensor.chunk(3)
            translation.state.update({target.query: query, target.value: value})
        elif isinstance(target, Rows):
            parts.setdefault(target.key, {})[target.part] = tensor
        elif isinstance(target, Buffer):
            translation.buffers[target, targets[key].stage, targets[key].block] = tensor
        else:
            translation.dropped.append(written)
    if unknown:
        raise ValueError(
            f"the {place.layout.name} layout has no place for {listed(unknown)}; if the file is of another layout, "
            "name it with layout="
        )
    for key, thirds in parts.items():
        if len(thirds) < 3:
            names = [entry.key for entry in targets.values() if our_key(entry.target) == key]
            raise ValueError(f"of {listed(names)} only {len(thirds)} are there; the file is incomplete")
        translation.state[key] = torch.cat([thirds[part] for part in range(3)])
    return translation


def to_theirs(state: State, place: Place, config: SwinHFConfig) -> dict[str, Tensor]:
    """Translate our state dict into the names of a layout; ValueError for keys that it has no name for.

    Bias tables are cut to the windows that its code builds, the buffers are computed, and no tensor is shared.
    """
    windows = windows_at_home(config, place)
    theirs: dict[str, Tensor] = {}
    named = set()
    like = next(iter(state.values()))
    for entry in expand(place):
        target, key = entry.target, our_key(entry.target)
        if isinstance(target, QueryValue):
            if target.query in state:
                named |= set(target)
                query, value = (state[name] for name in target)
                theirs[entry.key] = torch.cat([query, torch.zeros_like(query), value])
        elif key is not None:
            if key in state:
                named.add(key)
                tensor = state[key].chunk(3)[target.part] if isinstance(target, Rows) else state[key]
                if key.endswith("relative_position_bias_table"):
                    tensor = _central_part(tensor, config.stage_windows[entry.stage], windows[entry.stage])
                theirs[entry.key] = unfold(tensor) if isinstance(target, Unfolded) else tensor.clone()
        elif isinstance(target, Buffer) and (buffer := computed_buffer(target, place, config, entry, like)) is not None:
            theirs[entry.key] = buffer
    if nameless := set(state) - named:
        raise ValueError(f"the {place.layout.name} layout has no name for our {listed(nameless)}")
    return theirs


def _central_part(table: Tensor, window: Pair, smaller: Pair) -> Tensor:
    """The rows of a bias table, ``((2 Mh - 1)(2 Mw - 1), h)``, whose offsets a smaller window has."""
    rows: Tensor = table.unflatten(0, (2 * window[0] - 1, 2 * window[1] - 1))
    top, left = window[0] - smaller[0], window[1] - smaller[1]
    return rows[top : top + 2 * smaller[0] - 1, left : left + 2 * smaller[1] - 1].flatten(0, 1)


def stage_maps(grid: Pair, stages: int) -> list[Pair]:
    """Height and width of the map of each stage, where the first one's is ``grid``."""
    return [(-(-grid[0] // 2**stage), -(-grid[1] // 2**stage)) for stage in range(stages)]


def cut_windows(windows: Sequence[Pair], grid: Pair, rule: SmallMaps) -> list[Pair]:
    """The window of each stage as code with a rule builds it; ``grid`` is the map of the first stage."""
    cut = []
    for window, (rows, columns) in zip(windows, stage_maps(grid, len(windows)), strict=True):
        sides = {
            SmallMaps.CUT: (rows, columns),
            SmallMaps.CUT_TO_SHORTER: (min(rows, columns),) * 2,
            SmallMaps.CUT_TO_HEIGHT: (rows, rows),
        }.get(rule, window)
        cut.append(as_pair(map(min, window, sides)))
    return cut


def always_pads(config: SwinHFConfig, place: Place) -> bool:
    """Whether maps are padded to whole windows, and shifted, however small they are: here as in the layout's code."""
    return place.kind in (Kind.BACKBONE, Kind.SEGMENTER) and not config.cosine_attention


def windows_at_home(config: SwinHFConfig, place: Place) -> list[Pair]:
    """The window of each stage that the code of a layout builds for images of ``config.image_size``."""
    rule = SmallMaps.PAD if always_pads(config, place) else place.layout.small_maps
    return cut_windows(config.stage_windows, config.grid_hw, rule)


def _belongs(entry: Entry, kind: Kind) -> bool:
    """Whether a kind of model has this line of the table; two lines may name one key for different kinds."""
    ours = our_key(entry.target)
    if ours is None:
        return entry.target is not Buffer.UNUSED or kind is Kind.BACKBONE
    heads = ("decode_head.", "auxiliary_head.")
    if kind in (Kind.BACKBONE, Kind.SEGMENTER):
        others = ("swin.norm.", "classifier.", "decoder.", *(heads if kind is Kind.BACKBONE else ()))
        return not ours.startswith(others)
    return not ours.startswith(("hidden_states_norms.", *heads))


def computed_buffer(buffer: Buffer, place: Place, config: SwinHFConfig, entry: Entry, like: Tensor) -> Tensor | None:
    """A buffer of a block as the layout's code computes it, on the device of ``like``; None where it has none."""
    if buffer is Buffer.UNUSED:
        fill = torch.ones if entry.key.endswith("weight") else torch.zeros
        is_there = place.kind is Kind.BACKBONE
        return fill(config.hidden_size, dtype=like.dtype, device=like.device) if is_there else None
    if not place.layout.writes_buffers:
        return None
    window = windows_at_home(config, place)[entry.stage]
    if buffer is Buffer.COORDINATES:
        assert isinstance(config, SwinV2HFConfig)
        pretrained = config.pretrained_window_sizes[entry.stage]
        unit = as_pair(pretrained) if pretrained else window
        offsets = log_spaced_offsets(window, unit, like.device).to(like.dtype)
        return offsets.view(1, 2 * window[0] - 1, 2 * window[1] - 1, 2)
    if buffer is not Buffer.MASK:
        index = relative_position_index(window, device=like.device)
        return index.flatten() if buffer is Buffer.FLAT_INDEX else index
    if place.kind in (Kind.BACKBONE, Kind.SEGMENTER):
        return None  # detection forks compute the mask for each image
    grid = stage_maps(config.grid_hw, config.num_layers)[entry.stage]
    geometry = window_geometry(grid, window, shifted=entry.block % 2 == 1)
    if not geometry.is_shifted or geometry.is_padded:
        return None  # Microsoft's code refuses maps that are no whole windows; there is nothing to write
    return (shift_mask(geometry, like.device) + 0.0).to(like.dtype)  # the addition makes a zero of every -0.0


def fold(tensor: Tensor) -> Tensor:
    """Bring the last axis of ``(..., 4C)`` from ``nn.Unfold``'s order to ours.

    Theirs runs channel by channel over the taps (0, 0), (0, 1), (1, 0), (1, 1); ours tap by tap over (0, 0), (1, 0),
    (0, 1), (1, 1), as (row, column).
    """
    taps: Tensor = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :]  # ..., 4, C
    return taps.flatten(-2)


def unfold(tensor: Tensor) -> Tensor:
    """Inverse of :func:`fold`."""
    taps: Tensor = tensor.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]  # ..., 4, C
    return taps.transpose(-1, -2).flatten(-2)


def listed(keys: Iterable[str]) -> str:
    """Keys for an error message: sorted, at most 20, and how many there are."""
    names = sorted(keys)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {'key' if len(names) == 1 else 'keys'}: {', '.join(names[:SHOWN])}{more}"


CUTS_PICTURES = ("timm", "timm-old", "microsoft", "torchvision")  # the others pad them to whole patches


def differences(config: SwinHFConfig, place: Place) -> list[str]:
    """One sentence for each thing that the code of a layout computes differently, at the model's image size."""
    layout = place.layout
    if layout.name == "swin_hf":
        return []
    found = []
    if config.mask_padding:
        found.append("mask_padding is on, and only this package keeps padding out of attention")
    of_transformers = layout.name.startswith(("transformers", "maskformer"))
    if config.hidden_act != "gelu" and not of_transformers:
        found.append(f"hidden_act is {config.hidden_act!r}, it has 'gelu'")
    if config.layer_norm_eps != 1e-5:
        where = " in the embedding and between the stages" if of_transformers else ""
        found.append(f"layer_norm_eps is {config.layer_norm_eps}, it has 1e-05{where}")
    if always_pads(config, place):
        return found
    (height, width), patch = config.image_hw, config.patch_hw
    if layout.name in CUTS_PICTURES and (height % patch[0] or width % patch[1]):
        found.append(
            f"pictures of {height}x{width} do not divide into patches of {patch[0]}x{patch[1]}: here they are padded, "
            "there the rest is cut off"
        )
    windows, maps = config.stage_windows, stage_maps(config.grid_hw, config.num_layers)
    for stage, (window, there, grid) in enumerate(zip(windows, windows_at_home(config, place), maps, strict=True)):
        name = f"the {grid[0]}x{grid[1]} map of stage {stage + 1}"
        by_rule = {rule: window_geometry(grid, window, True, shift_per_axis=rule) for rule in (False, True)}
        if config.shift_per_axis != layout.shift_per_axis and by_rule[False] != by_rule[True]:
            found.append(
                f"{name} is covered by its window on one axis only, and shift_per_axis is {config.shift_per_axis} here "
                f"but {layout.shift_per_axis} there"
            )
        pairs = list(zip(grid, window, strict=True))
        # Where half a window is missing, the order only swaps two halves that do not see each other.
        is_shifted = config.depths[stage] > 1
        if layout.pads_after_shift and is_shifted and any(n > w and n % w and 2 * (n % w) != w for n, w in pairs):
            found.append(
                f"{name} is padded to whole windows of {window[0]}x{window[1]}, here before the cyclic shift, there "
                "after it"
            )
        if layout.small_maps is SmallMaps.CUT_TO_HEIGHT and is_shifted and grid[1] <= window[1] and grid[0] > window[0]:
            found.append(f"{name} is covered by its window in width only: here it is not shifted, there it is")
        if there != by_rule[False].window:
            found.append(
                f"{name} is smaller than its window of {window[0]}x{window[1]}: here the window shrinks, there "
                f"{layout.small_maps.value}"
            )
    return found
