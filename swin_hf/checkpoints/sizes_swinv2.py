"""The windows of a Swin V2: not to be read from its weights, so from what came with them, and never guessed."""

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from swin_hf.checkpoints.tables import Buffer, SmallMaps
from swin_hf.checkpoints.translate import Translation, cut_windows, windows_at_home
from swin_hf.model.configuration_swin_hf import SwinHFConfig, as_pair
from swin_hf.model.configuration_swinv2_hf import SwinV2HFConfig
from swin_hf.model.windows import Pair
from swin_hf.presets import SWINV2


def told_by_name(name: str) -> dict[str, Any]:
    """The sizes that the name of a released file, repository or architecture of timm means; empty for others."""
    core = re.sub(r"[^a-z0-9]+", "_", name.lower()).replace("_patch4", "")
    known = {re.sub("_22k.*", "", preset.replace("_patch4", "")): sizes for preset, sizes in SWINV2.items()}
    found = [sizes for preset, sizes in known.items() if preset in core]
    fields = ("image_size", "window_size", "pretrained_window_sizes")
    return {field: found[0][field] for field in fields if field in found[0]} if len(found) == 1 else {}


def windows_of(translation: Translation, hint: SwinHFConfig | None) -> dict[str, Any]:
    """``window_size`` and ``pretrained_window_sizes``, and ``image_size`` where smaller windows at the end show it.

    ``hint`` is what a configuration, a name or an argument says of the windows; ValueError if nothing says them.
    """
    stages = len(translation.place.depths)
    tables = {stage: table for (kind, stage, _), table in translation.buffers.items() if kind is Buffer.COORDINATES}
    known = [tables[stage] for stage in range(stages) if stage in tables and not tables[stage].is_meta]
    if len(known) == stages:
        windows = [((table.shape[-3] + 1) // 2, (table.shape[-2] + 1) // 2) for table in known]
        units = [
            tuple(_unit(table[..., axis].float(), side) for axis, side in enumerate(window))
            for table, window in zip(known, windows, strict=True)
        ]
        sizes = _before_clamping(translation, windows)
        if hint is not None and windows_at_home(hint, translation.place) == windows:
            sizes = {"window_size": hint.window_size}
        own = [0] * stages if units == windows else [short(unit) for unit in units]
        return {**sizes, "pretrained_window_sizes": own}
    if not isinstance(hint, SwinV2HFConfig) or hint.num_layers != stages:
        raise ValueError(
            "these weights of Swin Transformer V2 do not say in which windows they were trained, and no name or "
            "config.json next to them does; say it with preset= (one of swin_hf.list_presets('swinv2_hf')) or with "
            "config=SwinV2HFConfig(window_size=..., image_size=..., pretrained_window_sizes=...)"
        )
    return {"window_size": hint.window_size, "pretrained_window_sizes": hint.pretrained_window_sizes}


def _unit(coordinates: Tensor, side: int) -> int:
    """What offsets were divided by, from the largest coordinate ``log2(1 + 8 (side - 1) / (unit - 1)) / 3``."""
    return 1 if side == 1 else round(8 * (side - 1) / (2 ** (3 * float(coordinates.max())) - 1)) + 1


def _before_clamping(translation: Translation, windows: list[Pair]) -> dict[str, Any]:
    """One window for all stages, and the image size at which later maps are as small as their windows."""
    largest = max(windows, key=math.prod)
    if len(set(windows)) == 1:
        return {"window_size": short(largest)}
    patch = translation.state["swin.embeddings.patch_embeddings.weight"].shape[2:]
    grid = as_pair(side * 2 ** (len(windows) - 1) for side in windows[-1])
    if cut_windows([largest] * len(windows), grid, SmallMaps.CUT) == windows:
        return {"window_size": short(largest), "image_size": short([grid[0] * patch[0], grid[1] * patch[1]])}
    return {"window_size": [list(window) for window in windows]}


def short(sides: Sequence[int]) -> int | list[int]:
    """One integer for a square."""
    return sides[0] if len(set(sides)) == 1 else list(sides)
