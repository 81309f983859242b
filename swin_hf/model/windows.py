"""The geometry of shifted windows, as pure functions: padding, windows, cyclic shift, region mask, relative position.

And what a change of size does to the tensors that know a size: bias tables, position embeddings, patch kernels.
Nothing here knows of modules. Sizes are pairs (height, width), in tokens where nothing else is said.

Shape legend:
    B batch, H and W height and width of a map in tokens, C channels,
    nW windows of a map, N tokens of a window, M side of a window, h heads.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]

# Added to the scores of two tokens that are no neighbours in the image. The reference's value: large enough to
# vanish in the softmax, finite so that no row can become NaN (paper, figure 4).
MASKED = -100.0


class WindowGeometry(NamedTuple):
    """How one block cuts one map into windows; made by :func:`window_geometry`."""

    grid: Pair  # the map, before padding
    window: Pair  # what a window really spans: never more than the padded map
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
    grid: Pair,
    window: Pair,
    shifted: bool,
    *,
    shift_per_axis: bool = False,
    always_partition: bool = False,
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
        if not shift_per_axis:
            shift = (0, 0) if any(covered) else shift
        else:
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


def cyclic_shift(x: Tensor, shift: Pair) -> Tensor:
    """Roll a map ``(B, H, W, C)`` up and left by ``shift``; negative sides roll it back. Paper, figure 4."""
    return x if shift == (0, 0) else torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))


def window_partition(x: Tensor, window: Pair) -> Tensor:
    """Cut a padded map into windows, left to right and top to bottom.

    Inverse of :func:`window_reverse`. Paper, section 3.2.

    Args:
        x: Map, ``(B, H, W, C)``; ``H`` and ``W`` are multiples of the window's sides.
        window: Window height and width.

    Returns:
        ``(B * nW, N, C)``, tokens of a window row by row.

    Raises:
        ValueError: If the map is no multiple of the window; the message gives the size to pad to.
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
    """Put windows ``(B * nW, N, C)`` back in their places in a map ``(B, H, W, C)`` of size ``padded``."""
    rows, columns = window
    grid_rows, grid_columns = padded[0] // rows, padded[1] // columns
    windows = windows.reshape(-1, grid_rows, grid_columns, rows, columns, windows.shape[-1])
    return windows.transpose(2, 3).reshape(-1, *padded, windows.shape[-1])


def region_map(padded: Pair, window: Pair, shift: Pair, device: torch.device | str | None = None) -> Tensor:
    """Number the regions of a shifted map: tokens that were neighbours before the shift share a number.

    Along each axis there are three: what no border crosses, what is left of the last window, and what was carried
    over from the other side; their products are the 9 regions of figure 4. An axis without a shift has one region.

    Returns:
        Region of each token, ``(H, W)`` int64.
    """
    axes = []
    for side, span, offset in zip(padded, window, shift, strict=True):
        position = torch.arange(side, device=device)
        regions = (position >= side - span).long() + (position >= side - offset).long()
        axes.append(regions if offset else torch.zeros_like(regions))
    return axes[0][:, None] * 3 + axes[1][None, :]


def shift_mask(geometry: WindowGeometry, device: torch.device | str | None = None) -> Tensor:
    """What a shifted block adds to its scores: 0 within a region, :data:`MASKED` across regions.

    Returns:
        ``(nW, N, N)`` float32.
    """
    regions = region_map(geometry.padded, geometry.window, geometry.shift, device)
    regions = window_partition(regions[None, :, :, None], geometry.window)  # nW, N, 1
    return (regions != regions.transpose(1, 2)).float() * MASKED


def padding_mask(geometry: WindowGeometry, device: torch.device | str | None = None) -> Tensor:
    """Which keys of each window are padding, ``(nW, 1, N)`` bool, after the shift."""
    (height, width), (padded_height, padded_width) = geometry.grid, geometry.padded
    rows = torch.arange(padded_height, device=device) >= height
    columns = torch.arange(padded_width, device=device) >= width
    padding = (rows[:, None] | columns[None, :])[None, :, :, None]
    return window_partition(cyclic_shift(padding, geometry.shift), geometry.window).transpose(1, 2)


def relative_coordinates(window: Pair, device: torch.device | str | None = None) -> Tensor:
    """Row and column of every query token minus those of every key token, ``(N, N, 2)`` int64."""
    rows = torch.arange(window[0], device=device)
    columns = torch.arange(window[1], device=device)
    positions = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # N, 2
    return positions[:, None, :] - positions[None, :, :]


def relative_position_index(
    window: Pair, table_window: Pair | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Row of the bias table for every pair of tokens: two relative coordinates folded into one number.

    The coordinates of a window of M by M lie in ``[-M + 1, M - 1]``. Adding ``M - 1`` makes them start at 0;
    multiplying the row by ``2M - 1`` before the two are added keeps (0, -1) and (-1, 0) apart. Paper, section 3.2.

    Args:
        window: Window that attends.
        table_window: Window that the table was made for, if that is larger: the same offsets are then found in the
            central part of the table.
        device: Where the index is wanted.

    Returns:
        ``(N, N)`` int64 with values below ``(2 Mh - 1)(2 Mw - 1)`` of the table's window.
    """
    height, width = table_window or window
    relative = relative_coordinates(window, device)
    return (relative[..., 0] + height - 1) * (2 * width - 1) + relative[..., 1] + width - 1


@lru_cache(maxsize=64)
def _cached_index(window: Pair, table_window: Pair, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not serve a later training step
        return relative_position_index(window, table_window, device)


@lru_cache(maxsize=64)
def _cached_mask(geometry: WindowGeometry, mask_padding: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _window_mask(geometry, mask_padding, dtype, device)


def _window_mask(geometry: WindowGeometry, mask_padding: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    mask = shift_mask(geometry, device).to(dtype)
    if mask_padding and geometry.is_padded:
        # Half of the lowest number: the bias may be added without overflow, and a window of nothing but padding
        # has equal scores instead of a NaN.
        mask = mask.masked_fill(padding_mask(geometry, device), torch.finfo(dtype).min / 2)
    return mask


@lru_cache(maxsize=64)
def window_order(geometry: WindowGeometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shift and partition as one gather: which token of a padded map stands where in its windows, and the way back.

    Returns:
        Two permutations of ``Hp * Wp``, int64: ``map.flatten(1, 2)[:, first]`` are the windows, one after the other;
        ``[:, second]`` of that is the map.
    """
    (height, width), window = geometry.padded, geometry.window
    with torch.inference_mode(False):  # an inference tensor could not serve a later training step
        places = torch.arange(height * width, device=device).view(1, height, width, 1)
        order = window_partition(cyclic_shift(places, geometry.shift), window).flatten()
        return order, order.argsort()


def bias_index(like: Tensor, window: Pair, table_window: Pair) -> Tensor:
    """:func:`relative_position_index` on the device of ``like``, computed once for each size and device."""
    if _is_plain(like):
        return _cached_index(window, table_window, like.device)
    return relative_position_index(window, table_window, like.device)


def window_mask(like: Tensor, geometry: WindowGeometry, mask_padding: bool = False) -> Tensor | None:
    """Additive mask ``(nW, 1, N, N)`` in the dtype and on the device of ``like``, or None where nothing is masked.

    Computed once for each geometry, dtype and device.
    """
    if not geometry.is_shifted and not (mask_padding and geometry.is_padded):
        return None
    if _is_plain(like):
        mask = _cached_mask(geometry, mask_padding, like.dtype, like.device)
    else:
        mask = _window_mask(geometry, mask_padding, like.dtype, like.device)
    return mask[:, None]


def _is_plain(x: Tensor) -> bool:
    """Whether a result for ``x`` may be kept: not where somebody looks on with tensors or a memory of his own."""
    return type(x) in (Tensor, torch.nn.Parameter) and not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()  # fake tensors, an exporter's proxies
        or torch._C._are_functorch_transforms_active()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())  # CUDA graphs reuse what they allocate
    )


def resize_bias_table(table: Tensor, old: Pair, new: Pair, method: str = "bicubic") -> Tensor:
    """Resample a relative position bias table for another window.

    Args:
        table: ``((2 Mh - 1)(2 Mw - 1), h)`` of the old window.
        old: Old window height and width.
        new: New window height and width.
        method: ``"bicubic"`` as Microsoft's loader; ``"geometric"`` as SimMIM's, where the old offsets are spread
            over the new range in a geometric progression, so that near offsets keep their resolution.

    Returns:
        ``((2 Mh' - 1)(2 Mw' - 1), h)``, dtype and device of ``table``.

    Raises:
        ValueError: If the method is unknown or the table does not have the rows of the old window.
    """
    old_sides, new_sides = (2 * old[0] - 1, 2 * old[1] - 1), (2 * new[0] - 1, 2 * new[1] - 1)
    if table.shape[0] != old_sides[0] * old_sides[1]:
        raise ValueError(
            f"the bias table has {table.shape[0]} rows; a window of {old[0]}x{old[1]} has {old_sides[0] * old_sides[1]}"
        )
    if method not in ("bicubic", "geometric"):
        raise ValueError(f"unknown method {method!r}; choose 'bicubic' or 'geometric'")
    if old == new:
        return table
    maps = table.T.float().reshape(1, -1, *old_sides)  # 1, h, 2Mh - 1, 2Mw - 1
    if method == "bicubic":
        maps = F.interpolate(maps, size=new_sides, mode="bicubic", align_corners=False)
    else:
        for axis in (2, 3):
            weights = _geometric_weights(old_sides[axis - 2], new_sides[axis - 2]).to(maps)
            maps = torch.movedim(torch.movedim(maps, axis, -1) @ weights.T, -1, axis)
    return maps.reshape(-1, new_sides[0] * new_sides[1]).T.to(table.dtype).contiguous()


def _geometric_weights(old_side: int, new_side: int) -> Tensor:
    """Matrix ``(new_side, old_side)`` of a cubic spline through a geometric progression of offsets.

    SimMIM's ``remap_pretrained_keys_swin`` finds by bisection the ratio q for which ``1 + q + q^2 + ...`` over the
    old half axis reaches the end of the new one, places the old offsets there and interpolates. Where the window
    shrinks, q is 1: the same offsets of the old table.
    """
    half_old, half_new = old_side // 2, new_side // 2
    low, high = 1.0, max(1.5, float(half_new))
    for _ in range(60):
        ratio = (low + high) / 2
        if sum(ratio**power for power in range(half_old)) > half_new:
            high = ratio
        else:
            low = ratio
    steps = [sum(ratio**power for power in range(k + 1)) for k in range(half_old)]
    knots = torch.tensor([-s for s in reversed(steps)] + [0.0] + steps, dtype=torch.float64)
    targets = torch.arange(new_side, dtype=torch.float64) - half_new
    return _cubic_spline_weights(knots, targets.clamp(knots[0], knots[-1]))


def _cubic_spline_weights(knots: Tensor, targets: Tensor) -> Tensor:
    """Matrix that evaluates the cubic spline through ``knots`` at ``targets``, float64.

    The ends are "not a knot", as in FITPACK and so in SciPy's ``interp2d``, which SimMIM used: the third derivative
    is continuous at the second knot from each end. Three knots define a parabola, one knot a constant.
    """
    count = knots.numel()
    if count == 1:
        return torch.ones(targets.numel(), 1, dtype=torch.float64)
    gaps = knots.diff()
    # The second derivatives m solve A m = D y.
    a, d = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    for i in range(1, count - 1):
        a[i, i - 1], a[i, i], a[i, i + 1] = gaps[i - 1], 2 * (gaps[i - 1] + gaps[i]), gaps[i]
        d[i, i - 1], d[i, i + 1] = 6 / gaps[i - 1], 6 / gaps[i]
        d[i, i] = -d[i, i - 1] - d[i, i + 1]
    if count == 3:
        a[0, :2], a[2, 1:] = torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0])
    else:
        a[0, :3] = torch.stack([gaps[1], -gaps[0] - gaps[1], gaps[0]])
        a[-1, -3:] = torch.stack([gaps[-1], -gaps[-2] - gaps[-1], gaps[-2]])
    second = torch.linalg.solve(a, d)
    right = torch.searchsorted(knots, targets).clamp(1, count - 1)
    left = right - 1
    gap = gaps[left]
    u, v = (knots[right] - targets) / gap, (targets - knots[left]) / gap
    identity = torch.eye(count, dtype=torch.float64)
    linear = u[:, None] * identity[left] + v[:, None] * identity[right]
    bend = (u**3 - u)[:, None] * second[left] + (v**3 - v)[:, None] * second[right]
    weights: Tensor = linear + bend * (gap**2 / 6)[:, None]
    return weights


def resize_position_embeddings(embeddings: Tensor, old: Pair, new: Pair) -> Tensor:
    """Interpolate position embeddings ``(1, L, C)`` of one grid for another, bicubic; ``(1, H, W, C)``."""
    maps: Tensor = embeddings.unflatten(1, old)  # 1, H, W, C
    if old == new:
        return maps
    resized = F.interpolate(maps.permute(0, 3, 1, 2).float(), size=new, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(embeddings.dtype)


def resample_patches(kernel: Tensor, new: Pair) -> Tensor:
    """Resample patch kernels ``(out, in, h, w)`` for patches of ``new`` pixels, so that tokens stay what they were.

    The pseudo-inverse of FlexiViT (https://arxiv.org/abs/2212.08013, section 3.4): of all kernels of the new size the
    one whose answer to a patch enlarged with bicubic interpolation is the old kernel's answer to the patch itself.
    """
    old = (kernel.shape[2], kernel.shape[3])
    if old == new:
        return kernel
    pixels = torch.eye(old[0] * old[1], dtype=torch.float64).view(-1, 1, *old)
    enlarge = F.interpolate(pixels, size=new, mode="bicubic", align_corners=False).flatten(1)  # hw, h'w'
    resampled: Tensor = kernel.flatten(2).double() @ torch.linalg.pinv(enlarge).T.to(kernel.device)  # out, in, h'w'
    resampled = resampled.unflatten(2, new)  # out, in, h', w'
    return resampled.to(kernel.dtype)


def channel_matrix(old: int, new: int) -> Tensor:
    """Who stands for whom when image channels change: ``(new, old)`` float32, its ones divided by their column's sum.

    Multiplied with kernels, a picture of equal channels keeps its answer: with more channels than before, the old
    ones are taken in turn, each divided by how often it occurs (1 to 3: a third each); with fewer, the surplus is
    added in turn to those that stay (3 to 1: the sum).
    """
    matrix = torch.zeros(new, old)
    for place in range(max(old, new)):
        matrix[place % new, place % old] = 1
    return matrix / matrix.sum(dim=0)
