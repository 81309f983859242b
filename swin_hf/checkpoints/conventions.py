"""Where the code of two layouts computes different things from the same weights."""

from swin_hf.checkpoints.tables import Layout
from swin_hf.model.configuration_swin_hf import SwinHFConfig
from swin_hf.model.windows import window_geometry


def differences(config: SwinHFConfig, layout: Layout) -> list[str]:
    """One sentence for each thing that the code of a layout computes differently, at the model's image size."""
    if layout.name == "swin_hf":
        return []
    found = []
    if config.mask_padding:
        found.append("mask_padding is on, and only this package keeps padding out of attention")
    if not layout.name.startswith(("transformers", "maskformer")):
        if config.hidden_act != "gelu":
            found.append(f"hidden_act is {config.hidden_act!r}, it has 'gelu'")
        if config.layer_norm_eps != 1e-5:
            found.append(f"layer_norm_eps is {config.layer_norm_eps}, it has 1e-05")
    grid = config.grid_hw
    for stage, window in enumerate(config.stage_windows):
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
        if layout.pads_small_maps and any(side < w for side, w in pairs):
            found.append(
                f"{name} is smaller than its window of {window[0]}x{window[1]}: here the window shrinks, there the map "
                "is padded"
            )
        grid = (-(-grid[0] // 2), -(-grid[1] // 2))
    return found
