"""The geometry of shifted windows, as pure functions: padding, windows, cyclic shift, region mask, relative position.

Sizes are pairs (height, width) in tokens.

Shape legend:
    B batch, H and W height and width of a map in tokens, C channels,
    nW windows of a map, N tokens of a window, M side of a window, h heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]
Device = torch.device | str | None

# Added to the scores of two tokens that are not neighbours in the image. The reference's value: large enough to
# vanish in the softmax, finite so that no row can become NaN (paper, figure 4).
MASKED = -100.0


class WindowGeometry(NamedTuple):
    """How one block cuts one map into windows; made by :func:`window_geometry`."""

    grid: Pair  # the map, before padding
    window: Pair  # the window that attends: never larger than the padded map
    shift: Pair  # how far the windows are displaced down and right, (0, 0) for W-MSA
    padded: Pair  # the map padded to whole windows

    @property
    def num_windows(self) -> Pair:
        """Rows and columns of windows."""
        return self.padded[0] // self.window[0], self.padded[1] // self.window[1]

    @property
    def area(self) -> int:
        """Tokens of a window, N."""
        return self.window[0] * self.window[1]

    @property
    def is_shifted(self) -> bool:
        """Whether the block attends across the borders of the previous block's windows."""
        return self.shift != (0, 0)

    @property
    def is_padded(self) -> bool:
        """Whether the map needs padding."""
        return self.padded != self.grid


def window_geometry(
    grid: Pair, window: Pair, shifted: bool, *, shift_per_axis: bool = False, always_partition: bool = False
) -> WindowGeometry:
    """Decide how a block cuts a map: effective window, shift and padding.

    Where the map is shorter than the window, the window shrinks to the map, and where a window covers the map there
    is nothing to shift towards. The reference then drops the shift on both axes as soon as one is covered
    (Microsoft's ``SwinTransformerBlock``); timm and torchvision drop it on the covered axis only.

    Args:
        grid: Map height and width.
        window: Configured window height and width.
        shifted: Whether this is an SW-MSA block (every second one).
        shift_per_axis: Follow timm and torchvision instead of the reference.
        always_partition: Never shrink a window or drop a shift, pad instead: the convention of detection
            backbones, transformers' ``SwinBackbone`` among them.
    """
    shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
    if not always_partition:
        covered = (grid[0] <= window[0], grid[1] <= window[1])
        if any(covered) and not shift_per_axis:
            covered = (True, True)
        shift = (0 if covered[0] else shift[0], 0 if covered[1] else shift[1])
        window = (min(window[0], grid[0]), min(window[1], grid[1]))
    padded = (-(-grid[0] // window[0]) * window[0], -(-grid[1] // window[1]) * window[1])
    return WindowGeometry(grid, window, shift, padded)


def pad_to_windows(x: Tensor, geometry: WindowGeometry) -> Tensor:
    """Append rows and columns of zeros until whole windows fit, ``(B, H, W, C)`` to ``(B, Hp, Wp, C)``."""
    if not geometry.is_padded:
        return x
    (height, width), (padded_height, padded_width) = geometry.grid, geometry.padded
    return F.pad(x, (0, 0, 0, padded_width - width, 0, padded_height - height))


def gather_neighbours(x: Tensor) -> Tensor:
    """Concatenate 2x2 neighbours, ``(B, H, W, C)`` to ``(B, ceil(H / 2), ceil(W / 2), 4C)``; an odd side is padded.

    The reference goes down the columns first: (0, 0), (1, 0), (0, 1), (1, 1).
    """
    _, height, width, _ = x.shape
    x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # B, H/2, 2 rows, W/2, 2 columns, C
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)


def cyclic_shift(x: Tensor, shift: Pair) -> Tensor:
    """Roll a map ``(B, H, W, C)`` up and left by ``shift``; negative sides roll it back. Paper, figure 4."""
    return x if shift == (0, 0) else torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))


def window_partition(x: Tensor, window: Pair) -> Tensor:
    """Cut a padded map ``(B, H, W, C)`` into windows ``(B * nW, N, C)``, left to right and top to bottom.

    Raises:
        ValueError: If the map is not a multiple of the window; the message gives the size to pad to.
    """
    _, height, width, channels = x.shape
    rows, columns = window
    if height % rows or width % columns:
        padded = f"{-(-height // rows) * rows}x{-(-width // columns) * columns}"
        raise ValueError(
            f"window {rows}x{columns} does not divide the map {height}x{width}; pad it to {padded} (pad_to_windows)"
        )
    x = x.reshape(-1, height // rows, rows, width // columns, columns, channels)  # B, nH, Mh, nW, Mw, C
    return x.transpose(2, 3).reshape(-1, rows * columns, channels)


def window_reverse(windows: Tensor, window: Pair, padded: Pair) -> Tensor:
    """Put windows ``(B * nW, N, C)`` or ``(B * nW, N, h, d)`` back in their places in a map ``(B, *padded, C)``."""
    grid = padded[0] // window[0], padded[1] // window[1]
    x: Tensor = windows.unflatten(1, window).unflatten(0, (-1, *grid))  # B, nH, nW, Mh, Mw, ...
    return x.transpose(2, 3).reshape(-1, *padded, windows.shape[2:].numel())


def region_map(padded: Pair, window: Pair, shift: Pair, device: Device = None) -> Tensor:
    """Number the regions of a shifted map, ``(H, W)`` int64: neighbours before the shift share a number.

    Along each axis there are three: what no border crosses, what is left of the last window, and what was carried
    over from the other side; their products are the 9 regions of figure 4. An axis without a shift has one region.
    """
    axes = []
    for side, span, offset in zip(padded, window, shift, strict=True):
        position = torch.arange(side, device=device)
        regions = (position >= side - span).long() + (position >= side - offset).long()
        axes.append(regions if offset else torch.zeros_like(regions))
    return axes[0][:, None] * 3 + axes[1][None, :]


def shift_mask(geometry: WindowGeometry, device: Device = None) -> Tensor:
    """What a shifted block adds to its scores: 0 within a region, :data:`MASKED` across; ``(nW, N, N)`` float32."""
    regions = region_map(geometry.padded, geometry.window, geometry.shift, device)
    regions = window_partition(regions[None, :, :, None], geometry.window)  # nW, N, 1
    return (regions != regions.transpose(1, 2)).float() * MASKED


def padding_mask(geometry: WindowGeometry, device: Device = None) -> Tensor:
    """Which keys of each window are padding, ``(nW, 1, N)`` bool, after the shift."""
    (height, width), (padded_height, padded_width) = geometry.grid, geometry.padded
    rows = torch.arange(padded_height, device=device) >= height
    columns = torch.arange(padded_width, device=device) >= width
    padding = (rows[:, None] | columns[None, :])[None, :, :, None]
    return window_partition(cyclic_shift(padding, geometry.shift), geometry.window).transpose(1, 2)


def relative_coordinates(window: Pair, device: Device = None) -> Tensor:
    """Row and column of every query token minus those of every key token, ``(N, N, 2)`` int64."""
    rows = torch.arange(window[0], device=device)
    columns = torch.arange(window[1], device=device)
    positions = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # N, 2
    return positions[:, None, :] - positions[None, :, :]


def relative_position_index(window: Pair, table_window: Pair | None = None, device: Device = None) -> Tensor:
    """Row of the bias table for every pair of tokens of a window, ``(N, N)`` int64: two coordinates as one number.

    The coordinates of a window of M by M are in ``[-M + 1, M - 1]``. Adding ``M - 1`` makes them start at 0;
    multiplying the row by ``2M - 1`` before the two are added keeps (0, -1) and (-1, 0) apart. Paper, section 3.2.
    In the table of a larger ``table_window``, the same offsets are in the central part.
    """
    height, width = table_window or window
    relative = relative_coordinates(window, device)
    return (relative[..., 0] + height - 1) * (2 * width - 1) + relative[..., 1] + width - 1


def log_spaced_offsets(window: Pair, unit: Pair, device: Device = None) -> Tensor:
    """Relative coordinates as the coordinate network of Swin V2 takes them (https://arxiv.org/abs/2111.09883, eq. 4).

    The largest offset in a window ``unit`` is 1; a larger window has offsets beyond it. Returns the row and the column
    of each offset in the order of a bias table, ``((2 Mh - 1)(2 Mw - 1), 2)`` float32.
    """
    axes = []
    for side, span in zip(window, unit, strict=True):
        offsets = torch.arange(1 - side, side, dtype=torch.float32, device=device) / max(span - 1, 1) * 8
        axes.append(offsets.sign() * (offsets.abs() + 1).log2() / 3)  # log2(8) is 3
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def window_mask(
    geometry: WindowGeometry, mask_padding: bool, dtype: torch.dtype, device: Device = None
) -> Tensor | None:
    """Everything that a block adds to its scores besides the bias, ``(nW, 1, N, N)``; None where that is nothing.

    With ``mask_padding``, padded tokens are kept out of attention as keys.
    """
    mask_padding = mask_padding and geometry.is_padded
    if not geometry.is_shifted and not mask_padding:
        return None
    mask = shift_mask(geometry, device).to(dtype)
    if mask_padding:
        # Half of the lowest number: the bias may be added without overflow, and a window of nothing but padding
        # has equal scores instead of a NaN.
        mask = mask.masked_fill(padding_mask(geometry, device), torch.finfo(dtype).min / 2)
    return mask[:, None]
