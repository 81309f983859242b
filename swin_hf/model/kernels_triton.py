"""Window attention as one fused kernel in each direction: a padded map goes in, a padded map comes out.

The definition rolls the map, cuts it into windows, adds bias and mask to scores in memory, and undoes all of it.
Here a program computes where its tokens are: token t of window (a, b) is at row ``a Mh + t // Mw`` and
column ``b Mw + t % Mw`` of the shifted map. The cyclic shift of the paper (figure 4) is an addition that wraps around.
The mask is part of the bias, of which there is one table of size N x N for each head and kind of window; nothing else
of that size is in memory.

A program keeps one head and walks over the windows of the batch. Windows of up to 64 tokens are one tile. Larger
ones are cut into blocks of queries and keys, with a running softmax.

The backward recomputes the probabilities. The gradient of the bias is summed by each program in its own registers,
then over the programs in a fixed order: no atomics, hence the same bits in every run on the same machine.

Shape legend:
    B batch, Hp and Wp height and width of a padded map in tokens, nW windows of a map, N tokens of a window,
    Mh and Mw sides of a window, h heads, d channels of a head, Q and K tokens rounded up to whole blocks.
"""

# The arguments of a kernel are Triton's pointers and tensors, which have no type in Python.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import inspect
import itertools
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active  # a torch without it does without this file

from .windows import MASKED, Pair, WindowGeometry

LOG2E = math.log2(math.e)

try:
    import triton
    import triton.language as tl

    TRITON_MISSING = ""
    # Scores are kept in units of log2, because exp2 is one instruction.
    TO_LOG2 = tl.constexpr(LOG2E)
    OTHER_REGION = tl.constexpr(MASKED * LOG2E)
    PADDED_KEY = tl.constexpr(-1.0e30)  # finite: a window of nothing but padding must not become NaN
except ImportError as error:  # no wheels for this platform, or a CPU build of torch
    triton = None
    TRITON_MISSING = f"triton cannot be imported ({error}); install the triton that your torch release names"

C_COMPILER = os.name != "posix" or os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))
HEAD_DIMS = (16, 32, 64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Arguments whose value does not make a kernel compile again: Triton would do so for 1 and for multiples of 16.
SIZES = (
    *("images", "num_windows", "num_heads", "grid_h", "grid_w", "padded_h", "padded_w", "shift_h", "shift_w"),
    *("split_1", "split_2", "split_3", "elements"),
)
MAX_TOKENS = 1024  # of a window; the bias of a head then takes 4 MiB
INTERPRETED_MULTIPROCESSORS = 3  # few, so that every program of a test walks over several windows


def _jit(function: Any) -> Any:
    """``triton.jit`` that compiles once for all :data:`SIZES`; the function as it is where Triton is missing."""
    if triton is None:
        return function
    sizes = [name for name in inspect.signature(function).parameters if name in SIZES]
    return triton.jit(function, do_not_specialize=sizes)


# Device functions. `tokens` numbers tokens inside a window; `sizes` are grid_h, grid_w, padded_h, padded_w, shift_h,
# shift_w; `place` is the image of a window, and its row and column among the windows of the image.


@_jit
def _locate(place, tokens, sizes, MH: tl.constexpr, MW: tl.constexpr):
    """Offsets of the tokens of a window in ``(B, Hp, Wp)``, int64, and whether they are padding."""
    image, window_row, window_column = place
    grid_h, grid_w, padded_h, padded_w, shift_h, shift_w = sizes
    row = window_row * MH + tokens // MW + shift_h
    row = tl.where(row >= padded_h, row - padded_h, row)
    column = window_column * MW + tokens % MW + shift_w
    column = tl.where(column >= padded_w, column - padded_w, column)
    offset = (image * padded_h.to(tl.int64) + row) * padded_w + column
    return offset, (row >= grid_h) | (column >= grid_w)


@_jit
def _place(window, padded_h, padded_w, MH: tl.constexpr, MW: tl.constexpr):
    """Place of a window of the batch, and its kind: 1 in the last row, plus 2 in the last column."""
    rows = padded_h // MH
    columns = padded_w // MW
    row = window % (rows * columns) // columns
    column = window % columns
    kind = tl.where(row == rows - 1, 1, 0) + tl.where(column == columns - 1, 2, 0)
    return (window // (rows * columns), row, column), kind


@_jit
def _share(images, num_heads, sizes, splits, MH: tl.constexpr, MW: tl.constexpr):
    """The windows of this program, all of one kind, so that the bias with its mask is loaded once.

    Programs are numbered head by head; those of a head are its slots. Slots up to ``split_1`` have windows that meet no
    border of the shifted map, then those of the last row, of the last column, and of the corner. Windows of a kind fill
    a rectangle of every map and are counted through.

    Returns:
        Kind; first window, number of windows and step between two; top, left, height and width of the rectangle.
    """
    slot, slots = tl.program_id(0) // num_heads, tl.num_programs(0) // num_heads
    _, _, padded_h, padded_w, shift_h, shift_w = sizes
    split_1, split_2, split_3 = splits
    kind = tl.where(slot < split_1, 0, tl.where(slot < split_2, 1, tl.where(slot < split_3, 2, 3)))
    begin = tl.where(slot < split_1, 0, tl.where(slot < split_2, split_1, tl.where(slot < split_3, split_2, split_3)))
    end = tl.where(slot < split_1, split_1, tl.where(slot < split_2, split_2, tl.where(slot < split_3, split_3, slots)))
    inner_h = padded_h // MH - tl.where(shift_h > 0, 1, 0)
    inner_w = padded_w // MW - tl.where(shift_w > 0, 1, 0)
    top = tl.where(kind % 2 == 1, inner_h, 0)
    left = tl.where(kind >= 2, inner_w, 0)
    height = tl.where(kind % 2 == 1, 1, inner_h)
    width = tl.where(kind >= 2, 1, inner_w)
    return kind, slot - begin, images * height * width, end - begin, (top, left, height, width)


@_jit
def _place_in(rectangle, index):
    """Place of a window that is counted through a rectangle of every map."""
    top, left, height, width = rectangle
    return index // (height * width), top + index % (height * width) // width, left + index % width


@_jit
def _load_rows(pointer, offsets, stride, column, real, D: tl.constexpr):
    """Load ``(tokens, d)`` of one head; tokens that only fill up the block are 0, whatever is in memory."""
    dims = tl.arange(0, D)
    return tl.load(pointer + offsets[:, None] * stride + column + dims[None, :], mask=real[:, None], other=0.0)


@_jit
def _load_keys(qkv, offsets, num_heads, head, real, D: tl.constexpr):
    """Load keys and values of one head."""
    stride = num_heads * (3 * D)
    k = _load_rows(qkv, offsets, stride, (num_heads + head) * D, real, D)
    return k, _load_rows(qkv, offsets, stride, (2 * num_heads + head) * D, real, D)


@_jit
def _store_rows(pointer, offsets, stride, column, real, rows, D: tl.constexpr):
    """Store ``(tokens, d)`` of one head in the dtype of the tensor."""
    dims = tl.arange(0, D)
    where = pointer + offsets[:, None] * stride + column + dims[None, :]
    tl.store(where, rows.to(pointer.dtype.element_ty), mask=real[:, None])


@_jit
def _scores(q, k, bias, scale, padding, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr):
    """``q k^T / sqrt(d)`` with bias and mask, in units of log2, float32; padded keys are pushed down where wanted."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * TO_LOG2) + bias
    if MASK_PADDING:
        # The lower of the two: what only fills up the block is at -inf and stays there.
        scores = tl.where(padding[None, :], tl.minimum(scores, PADDED_KEY), scores)
    return scores


# Kernels. Those called "tile" have a whole window in one block, the others go through a window in blocks.


@_jit
def _forward_tile_kernel(
    qkv, bias, out, images, num_heads, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, split_1, split_2, split_3,
    scale, MH: tl.constexpr, MW: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend. A program has one head and walks over windows; its tile of the bias stays in registers.

    Neighbouring programs have neighbouring heads of the same window and share its cache lines.

    Pointers and scalars:
        qkv: ``(B, Hp, Wp, 3, h, d)``.
        bias: ``(1 or 4 masks, h, Q, K)`` float32 from :func:`_bias_kernel`.
        out: ``(B, Hp, Wp, h, d)``; every element is written.
        scale: ``1 / sqrt(d)``. Scores, probabilities and sums are float32.
    """
    sizes = (grid_h, grid_w, padded_h, padded_w, shift_h, shift_w)
    head = tl.program_id(0) % num_heads
    kind, first, number, step, rectangle = _share(images, num_heads, sizes, (split_1, split_2, split_3), MH, MW)
    tokens = tl.arange(0, BLOCK_Q)
    real = tokens < MH * MW
    inner = tokens[:, None] * BLOCK_K + tokens[None, :]
    tile = tl.load(bias + (kind * num_heads + head) * (BLOCK_Q * BLOCK_K) + inner)
    for index in tl.range(first, number, step, num_stages=STAGES):
        offsets, padding = _locate(_place_in(rectangle, index), tokens, sizes, MH, MW)
        q = _load_rows(qkv, offsets, num_heads * (3 * D), head * D, real, D)
        k, v = _load_keys(qkv, offsets, num_heads, head, real, D)
        scores = _scores(q, k, tile, scale, padding, MASK_PADDING, PRECISION)
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        attended = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) / tl.sum(weights, 1)[:, None]
        _store_rows(out, offsets, num_heads * D, head * D, real, attended, D)


@_jit
def _backward_tile_kernel(
    qkv, bias, grad_out, grad_qkv, partials, images, num_heads, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w,
    split_1, split_2, split_3, scale, MH: tl.constexpr, MW: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, MASK_PADDING: tl.constexpr, NEED_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v and the bias. A program has one head and walks over windows, each read and written once.

    Pointers and scalars as in :func:`_forward_tile_kernel`, and:
        grad_out: ``(B, Hp, Wp, h, d)``.
        grad_qkv: ``(B, Hp, Wp, 3, h, d)``; every element is written.
        partials: ``(programs / h, h, Q, K)`` float32, the gradient of the bias as far as each program saw it.

    Probabilities, their gradients and all sums are float32.
    """
    sizes = (grid_h, grid_w, padded_h, padded_w, shift_h, shift_w)
    head = tl.program_id(0) % num_heads
    kind, first, number, step, rectangle = _share(images, num_heads, sizes, (split_1, split_2, split_3), MH, MW)
    tokens = tl.arange(0, BLOCK_Q)
    real = tokens < MH * MW
    stride = num_heads * (3 * D)
    inner = tokens[:, None] * BLOCK_K + tokens[None, :]
    tile = tl.load(bias + (kind * num_heads + head) * (BLOCK_Q * BLOCK_K) + inner)
    if NEED_BIAS:
        grad_bias = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    for index in tl.range(first, number, step, num_stages=STAGES):
        offsets, padding = _locate(_place_in(rectangle, index), tokens, sizes, MH, MW)
        q = _load_rows(qkv, offsets, stride, head * D, real, D)
        k, v = _load_keys(qkv, offsets, num_heads, head, real, D)
        grad = _load_rows(grad_out, offsets, num_heads * D, head * D, real, D)

        scores = _scores(q, k, tile, scale, padding, MASK_PADDING, PRECISION)
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
        # Rows that only fill up the tile have gradient 0, so nothing of them reaches a key or the bias.
        grad_v = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=PRECISION)
        _store_rows(grad_qkv, offsets, stride, (2 * num_heads + head) * D, real, grad_v, D)

        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        mean = tl.sum(weights * grad_weights, 1)
        grad_scores = weights * (grad_weights - mean[:, None])
        if NEED_BIAS:
            grad_bias += grad_scores
        rounded = grad_scores.to(q.dtype)
        grad_q = tl.dot(rounded, k, input_precision=PRECISION) * scale
        _store_rows(grad_qkv, offsets, stride, head * D, real, grad_q, D)
        grad_k = tl.dot(tl.trans(rounded), q, input_precision=PRECISION) * scale
        _store_rows(grad_qkv, offsets, stride, (num_heads + head) * D, real, grad_k, D)

    if NEED_BIAS:
        tl.store(partials + tl.program_id(0).to(tl.int64) * (BLOCK_Q * BLOCK_K) + inner, grad_bias)


@_jit
def _forward_block_kernel(
    qkv, bias, out, num_windows, num_heads, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, scale,
    MH: tl.constexpr, MW: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend, with a running softmax. A program has one head and one block of queries, and walks over windows.

    Pointers and scalars as in :func:`_forward_tile_kernel`.
    """
    N: tl.constexpr = MH * MW
    Q_BLOCKS: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    Q: tl.constexpr = Q_BLOCKS * BLOCK_Q
    K: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K * BLOCK_K

    sizes = (grid_h, grid_w, padded_h, padded_w, shift_h, shift_w)
    lanes = num_heads * Q_BLOCKS
    head = tl.program_id(0) % lanes // Q_BLOCKS
    queries = tl.program_id(0) % Q_BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    bias += head * (Q * K) + queries[:, None] * K + keys[None, :]

    for window in tl.range(tl.program_id(0) // lanes, num_windows, tl.num_programs(0) // lanes):
        place, kind = _place(window, padded_h, padded_w, MH, MW)
        q_offsets, _ = _locate(place, queries, sizes, MH, MW)
        q = _load_rows(qkv, q_offsets, num_heads * (3 * D), head * D, queries < N, D)
        tiles = bias + kind * SHIFTED * num_heads * (Q * K)
        highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.full([BLOCK_Q], 0.0, tl.float32)
        attended = tl.full([BLOCK_Q, D], 0.0, tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k_offsets, padding = _locate(place, start + keys, sizes, MH, MW)
            k, v = _load_keys(qkv, k_offsets, num_heads, head, start + keys < N, D)
            scores = _scores(q, k, tl.load(tiles + start), scale, padding, MASK_PADDING, PRECISION)
            higher = tl.maximum(highest, tl.max(scores, 1))
            correction = tl.exp2(highest - higher)
            weights = tl.exp2(scores - higher[:, None])
            total = total * correction + tl.sum(weights, 1)
            attended = attended * correction[:, None]
            attended += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            highest = higher
        _store_rows(out, q_offsets, num_heads * D, head * D, queries < N, attended / total[:, None], D)


@_jit
def _backward_query_kernel(
    qkv, bias, grad_out, grad_qkv, stats, num_windows, num_heads, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w,
    scale, MH: tl.constexpr, MW: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of q, and what the next two kernels need to know of each query, for windows of several blocks.

    A program has one head and one block of queries, and walks over windows. Pointers and scalars as in
    :func:`_backward_tile_kernel`, and:
        stats: ``(B * nW, h, 2, Q)`` float32: log2 of the softmax's denominator, and the mean of the gradient of the
            probabilities under the probabilities themselves.
    """
    N: tl.constexpr = MH * MW
    Q_BLOCKS: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    Q: tl.constexpr = Q_BLOCKS * BLOCK_Q
    K: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K * BLOCK_K

    sizes = (grid_h, grid_w, padded_h, padded_w, shift_h, shift_w)
    lanes = num_heads * Q_BLOCKS
    head = tl.program_id(0) % lanes // Q_BLOCKS
    queries = tl.program_id(0) % Q_BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    stride = num_heads * (3 * D)
    bias += head * (Q * K) + queries[:, None] * K + keys[None, :]

    for window in tl.range(tl.program_id(0) // lanes, num_windows, tl.num_programs(0) // lanes):
        place, kind = _place(window, padded_h, padded_w, MH, MW)
        q_offsets, _ = _locate(place, queries, sizes, MH, MW)
        q = _load_rows(qkv, q_offsets, stride, head * D, queries < N, D)
        grad = _load_rows(grad_out, q_offsets, num_heads * D, head * D, queries < N, D)
        tiles = bias + kind * SHIFTED * num_heads * (Q * K)

        highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.full([BLOCK_Q], 0.0, tl.float32)
        mean = tl.full([BLOCK_Q], 0.0, tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k_offsets, padding = _locate(place, start + keys, sizes, MH, MW)
            k, v = _load_keys(qkv, k_offsets, num_heads, head, start + keys < N, D)
            scores = _scores(q, k, tl.load(tiles + start), scale, padding, MASK_PADDING, PRECISION)
            higher = tl.maximum(highest, tl.max(scores, 1))
            correction = tl.exp2(highest - higher)
            weights = tl.exp2(scores - higher[:, None])
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            total = total * correction + tl.sum(weights, 1)
            mean = mean * correction + tl.sum(weights * grad_weights, 1)
            highest = higher
        denominator = highest + tl.log2(total)
        mean = mean / total
        record = stats + (window * num_heads.to(tl.int64) + head) * (2 * Q) + queries
        tl.store(record, denominator)
        tl.store(record + Q, mean)

        grad_q = tl.full([BLOCK_Q, D], 0.0, tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k_offsets, padding = _locate(place, start + keys, sizes, MH, MW)
            k, v = _load_keys(qkv, k_offsets, num_heads, head, start + keys < N, D)
            scores = _scores(q, k, tl.load(tiles + start), scale, padding, MASK_PADDING, PRECISION)
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_scores = tl.exp2(scores - denominator[:, None]) * (grad_weights - mean[:, None])
            grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
        _store_rows(grad_qkv, q_offsets, stride, head * D, queries < N, grad_q * scale, D)


@_jit
def _backward_key_kernel(
    qkv, bias, grad_out, grad_qkv, stats, num_windows, num_heads, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w,
    scale, MH: tl.constexpr, MW: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v for windows of several blocks: one head and one block of keys, walking over windows.

    Pointers and scalars as in :func:`_backward_query_kernel`, which has filled ``stats``.
    """
    N: tl.constexpr = MH * MW
    K_BLOCKS: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K
    Q: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    K: tl.constexpr = K_BLOCKS * BLOCK_K

    sizes = (grid_h, grid_w, padded_h, padded_w, shift_h, shift_w)
    lanes = num_heads * K_BLOCKS
    head = tl.program_id(0) % lanes // K_BLOCKS
    keys = tl.program_id(0) % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    queries = tl.arange(0, BLOCK_Q)
    stride = num_heads * (3 * D)
    bias += head * (Q * K) + queries[:, None] * K + keys[None, :]

    for window in tl.range(tl.program_id(0) // lanes, num_windows, tl.num_programs(0) // lanes):
        place, kind = _place(window, padded_h, padded_w, MH, MW)
        k_offsets, padding = _locate(place, keys, sizes, MH, MW)
        k, v = _load_keys(qkv, k_offsets, num_heads, head, keys < N, D)
        tiles = bias + kind * SHIFTED * num_heads * (Q * K)
        record = stats + (window * num_heads.to(tl.int64) + head) * (2 * Q) + queries
        grad_k = tl.full([BLOCK_K, D], 0.0, tl.float32)
        grad_v = tl.full([BLOCK_K, D], 0.0, tl.float32)
        for start in tl.range(0, Q, BLOCK_Q, num_stages=STAGES):
            q_offsets, _ = _locate(place, start + queries, sizes, MH, MW)
            q = _load_rows(qkv, q_offsets, stride, head * D, start + queries < N, D)
            grad = _load_rows(grad_out, q_offsets, num_heads * D, head * D, start + queries < N, D)
            denominator = tl.load(record + start)
            mean = tl.load(record + Q + start)
            scores = _scores(q, k, tl.load(tiles + start * K), scale, padding, MASK_PADDING, PRECISION)
            weights = tl.exp2(scores - denominator[:, None])
            grad_v += tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=PRECISION)
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - mean[:, None])
            grad_k += tl.dot(tl.trans(grad_scores.to(q.dtype)), q, input_precision=PRECISION)
        _store_rows(grad_qkv, k_offsets, stride, (num_heads + head) * D, keys < N, grad_k * scale, D)
        _store_rows(grad_qkv, k_offsets, stride, (2 * num_heads + head) * D, keys < N, grad_v, D)


@_jit
def _backward_bias_kernel(
    qkv, bias, grad_out, partials, stats, num_windows, num_heads, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w,
    scale, MH: tl.constexpr, MW: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of the bias for windows of several blocks: one head and one tile of the bias, walking over windows.

    Pointers and scalars as in :func:`_backward_query_kernel`, which has filled ``stats``, and:
        partials: ``(programs / (h * tiles), h, Q, K)`` float32.
    """
    N: tl.constexpr = MH * MW
    Q_BLOCKS: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    K_BLOCKS: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K
    Q: tl.constexpr = Q_BLOCKS * BLOCK_Q
    K: tl.constexpr = K_BLOCKS * BLOCK_K

    sizes = (grid_h, grid_w, padded_h, padded_w, shift_h, shift_w)
    lanes = num_heads * (Q_BLOCKS * K_BLOCKS)
    head = tl.program_id(0) % lanes // (Q_BLOCKS * K_BLOCKS)
    queries = tl.program_id(0) // K_BLOCKS % Q_BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = tl.program_id(0) % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    inner = head * (Q * K) + queries[:, None] * K + keys[None, :]
    grad_bias = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)

    first = tl.program_id(0) // lanes
    for window in tl.range(first, num_windows, tl.num_programs(0) // lanes, num_stages=STAGES):
        place, kind = _place(window, padded_h, padded_w, MH, MW)
        q_offsets, _ = _locate(place, queries, sizes, MH, MW)
        k_offsets, padding = _locate(place, keys, sizes, MH, MW)
        q = _load_rows(qkv, q_offsets, num_heads * (3 * D), head * D, queries < N, D)
        k, v = _load_keys(qkv, k_offsets, num_heads, head, keys < N, D)
        grad = _load_rows(grad_out, q_offsets, num_heads * D, head * D, queries < N, D)
        record = stats + (window * num_heads.to(tl.int64) + head) * (2 * Q) + queries
        denominator = tl.load(record)
        mean = tl.load(record + Q)
        tile = tl.load(bias + kind * SHIFTED * num_heads * (Q * K) + inner)
        scores = _scores(q, k, tile, scale, padding, MASK_PADDING, PRECISION)
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_bias += tl.exp2(scores - denominator[:, None]) * (grad_weights - mean[:, None])
    tl.store(partials + first.to(tl.int64) * (num_heads * (Q * K)) + inner, grad_bias)


@_jit
def _bias_kernel(
    table, bias, num_heads, elements, shift_h, shift_w, MH: tl.constexpr, MW: tl.constexpr, TABLE_H: tl.constexpr,
    TABLE_W: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Look up the bias of every pair of tokens, and add the masks. A program fills BLOCK elements.

    Of the nine regions of figure 4, a window has at most two along each axis: two above each other in the last row, two
    next to each other in the last column. Hence four masks, numbered by the kind of the window.

    Pointers and scalars:
        table: ``((2 TABLE_H - 1)(2 TABLE_W - 1), h)``, any floating dtype.
        bias: ``(1 or 4 masks, h, Q, K)`` float32 in units of log2; -inf in columns from N on, so that keys which only
            fill up a block never count.
        elements: Number of elements of ``bias``.
    """
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element // (Q * K) // num_heads
    head = element // (Q * K) % num_heads
    query = element // K % Q
    key = element % K
    query_row, query_column = query // MW, query % MW
    key_row, key_column = key // MW, key % MW

    entry = (query_row - key_row + TABLE_H - 1) * (2 * TABLE_W - 1) + query_column - key_column + TABLE_W - 1
    inside = (element < elements) & (query < MH * MW) & (key < MH * MW)
    value = tl.load(table + entry * num_heads + head, mask=inside, other=0.0).to(tl.float32) * TO_LOG2
    row_border = (query_row >= MH - shift_h) != (key_row >= MH - shift_h)
    column_border = (query_column >= MW - shift_w) != (key_column >= MW - shift_w)
    apart = ((mask % 2 == 1) & row_border) | ((mask // 2 == 1) & column_border)
    value += tl.where(apart, OTHER_REGION, 0.0)
    tl.store(bias + element, tl.where(key < MH * MW, value, float("-inf")), mask=element < elements)


@_jit
def _table_kernel(
    grad_bias, grad_table, num_heads, MH: tl.constexpr, MW: tl.constexpr, TABLE_H: tl.constexpr, TABLE_W: tl.constexpr,
    Q: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of all pairs of tokens that share an entry of the table: one entry of one head a program.

    Pointers:
        grad_bias: ``(h, Q, K)`` float32.
        grad_table: ``((2 TABLE_H - 1)(2 TABLE_W - 1), h)`` float32; entries that no pair uses become 0.
    """
    entry = tl.program_id(0) // num_heads
    head = tl.program_id(0) % num_heads
    row = entry // (2 * TABLE_W - 1) - (TABLE_H - 1)
    column = entry % (2 * TABLE_W - 1) - (TABLE_W - 1)
    query = tl.arange(0, BLOCK)
    key_row = query // MW - row
    key_column = query % MW - column
    pair = (query < MH * MW) & (key_row >= 0) & (key_row < MH) & (key_column >= 0) & (key_column < MW)
    where = head.to(tl.int64) * (Q * K) + query * K + key_row * MW + key_column
    tl.store(grad_table + tl.program_id(0), tl.sum(tl.load(grad_bias + where, mask=pair, other=0.0), 0))


class Launch(NamedTuple):
    """How a kernel is cut and run: tokens of a block, warps, stages of the pipeline, programs per multiprocessor."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    occupancy: int

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "enable_fp_fusion": True,  # Triton 3.10 turns it off unless told
        }


def choose_launch(kernel: str, tokens: int, head_dim: int, dtype: torch.dtype, capability: Pair) -> Launch:
    """How to launch ``kernel``, "forward" or "backward".

    In 16 bits on Hopper with heads of 32 channels: the fastest on an H200, of those that ``python -m
    benchmarks.launches`` tries; Blackwell and heads of 16 have the same, untimed. Else by compiling every kernel for
    compute capability 8.0 and 9.0: at most a few bytes of registers spill, and a multiprocessor holds all programs at
    once. ``tests/model/test_kernels_triton.py`` compiles them again.
    """
    forward = kernel == "forward"
    datacentre = capability[0] in (9, 10)  # Hopper and Blackwell: wgmma or its successor, 228 KB of shared memory
    block = max(16, triton.next_power_of_2(tokens))
    if dtype == torch.float32:
        if tokens > 64 or head_dim == 64:
            return Launch(32, 32, 8, 1, 2 if forward else 1)
        return Launch(block, block, block // 8, 1, 2 if forward else 1)
    if block >= 64 and head_dim <= 32 and datacentre:
        return Launch(64, 64, 4, 3, 4 if forward or tokens > 64 else 6)
    if tokens > 64 or (block == 64 and head_dim == 64 and not forward and not datacentre):
        return Launch(64, 32, 4, 2, 3 if forward and (datacentre or head_dim < 64) else 2)
    if block < 64:
        return Launch(block, block, block // 16, 2, 10 if block == 16 else 7 if forward else 4)
    if forward:
        return Launch(64, 64, 4, 2, 2 if head_dim == 64 else 3)
    return Launch(64, 64, 4, 2 if datacentre else 1, 2)


class Problem:
    """One call of the kernels: its sizes in tokens, and how to launch a kernel for them."""

    def __init__(self, qkv: Tensor, num_heads: int, sizes: Sequence[int], scaling: float, mask_padding: bool) -> None:
        self.grid, window, self.shift, self.table_window = (tuple(sizes[i : i + 2]) for i in range(0, 8, 2))
        self.images, self.padded, self.scaling = qkv.shape[0], (qkv.shape[1], qkv.shape[2]), scaling
        self.num_heads, self.head_dim = num_heads, qkv.shape[3] // (3 * num_heads)
        self.window, self.tokens = window, window[0] * window[1]
        self.windows = (self.padded[0] // window[0], self.padded[1] // window[1])
        self.num_windows = self.images * self.windows[0] * self.windows[1]
        self.is_shifted = self.shift != (0, 0)
        self.device, self.dtype = qkv.device, qkv.dtype
        precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
        self.constants = {"MH": window[0], "MW": window[1], "D": self.head_dim, "PRECISION": precision}
        self.constants["MASK_PADDING"] = mask_padding
        if self.device.type == "cuda":
            device = torch.cuda.get_device_properties(self.device)
            self.capability, self.multiprocessors = (device.major, device.minor), device.multi_processor_count
        else:
            self.capability, self.multiprocessors = (9, 0), INTERPRETED_MULTIPROCESSORS

    def choose(self, kernel: str) -> Launch:
        """How to cut and run a kernel."""
        return choose_launch(kernel, self.tokens, self.head_dim, self.dtype, self.capability)

    def blocks(self, launch: Launch) -> Pair:
        """Blocks of queries and of keys in a window."""
        return -(-self.tokens // launch.block_q), -(-self.tokens // launch.block_k)

    def bias(self, table: Tensor, launch: Launch) -> Tensor:
        """The bias of every pair of tokens, with the masks of shifted windows, ``(1 or 4, h, Q, K)`` float32."""
        q_blocks, k_blocks = self.blocks(launch)
        queries, keys = q_blocks * launch.block_q, k_blocks * launch.block_k
        bias = table.new_empty(4 if self.is_shifted else 1, self.num_heads, queries, keys, dtype=torch.float32)
        windows = (*self.shift, *self.window, *self.table_window)
        programs = triton.cdiv(bias.numel(), 1024)
        _bias_kernel[(programs,)](
            table.contiguous(), bias, self.num_heads, bias.numel(), *windows, queries, keys, BLOCK=1024
        )
        return bias

    def fold(self, partials: Tensor, table: Tensor) -> Tensor:
        """The gradient of the table from what each program saw, ``(programs, h, Q, K)``, summed in a fixed order."""
        grad_table = torch.empty_like(table, dtype=torch.float32, memory_format=torch.contiguous_format)
        grad_bias = partials.sum(0)
        sizes = (self.num_heads, *self.window, *self.table_window, *grad_bias.shape[1:])
        _table_kernel[(table.numel(),)](grad_bias, grad_table, *sizes, BLOCK=triton.next_power_of_2(self.tokens))
        return grad_table.to(table.dtype)

    def slots(self, lanes: int, launch: Launch) -> int:
        """Programs that share the windows of one lane (a head, or a block of a head): together about one wave."""
        return max(1, min(self.num_windows, self.multiprocessors * launch.occupancy // lanes))

    def splits(self, launch: Launch) -> list[int]:
        """Slots of a tile kernel by kind of window, as running totals: inside, last row, last column, corner."""
        cut_h, cut_w = int(self.shift[0] > 0), int(self.shift[1] > 0)
        inner_h, inner_w = self.windows[0] - cut_h, self.windows[1] - cut_w
        kinds = (inner_h * inner_w, cut_h * inner_w, inner_h * cut_w, cut_h * cut_w)
        slots = self.slots(self.num_heads, launch)
        shares = [min(self.images * kind, max(1, slots * kind // sum(kinds))) for kind in kinds]
        return list(itertools.accumulate(shares))

    def run_tile(self, kernel: Any, launch: Launch, splits: list[int], *tensors: Tensor, **constants: bool) -> None:
        """Run a kernel that has a whole window in one block."""
        sizes = (self.images, self.num_heads, *self.grid, *self.padded, *self.shift, *splits[:3], self.scaling)
        kernel[(self.num_heads * splits[3],)](*tensors, *sizes, **self.constants, **constants, **launch.options())

    def run_blocks(self, kernel: Any, launch: Launch, lanes: int, *tensors: Tensor) -> None:
        """Run a kernel that goes through a window in blocks."""
        sizes = (self.num_windows, self.num_heads, *self.grid, *self.padded, *self.shift, self.scaling)
        programs = lanes * self.slots(lanes, launch)
        kernel[(programs,)](*tensors, *sizes, SHIFTED=self.is_shifted, **self.constants, **launch.options())


# Whether TRITON_INTERPRET=1 was set when Triton was imported: kernels then run on a CPU, in Python. Looked up here,
# because torch.compile cannot ask for the type of a kernel.
INTERPRETED = triton is not None and not isinstance(_forward_tile_kernel, triton.JITFunction)


def reasons_against_triton(
    device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, window: Pair | None = None
) -> list[str]:
    """Reasons why the kernels cannot run; empty if they can.

    Args:
        device: Where q, k and v are.
        dtype: Type of q, k and v.
        head_dim: Channels of a head, d.
        dropout: Probability of dropping an attention probability in this call.
        window: Window that attends, if its size matters already.
    """
    if triton is None:
        return [TRITON_MISSING]
    reasons = []
    if device.type == "cuda":
        if torch.version.hip is not None:
            reasons.append("the device is an AMD GPU; the kernels are built and tested for NVIDIA")
        elif torch.cuda.get_device_capability(device) < (8, 0):
            reasons.append("the GPU is older than Ampere (compute capability 8.0)")
        if not C_COMPILER:
            reasons.append("there is no C compiler, with which Triton builds its launcher; install gcc, or set CC")
    elif device.type != "cpu" or not INTERPRETED:
        reasons.append(f"the device is {device.type}; the kernels need CUDA")
    if dtype not in DTYPES:
        reasons.append(f"the dtype is {dtype}; the kernels take float16, bfloat16 and float32")
    elif dtype == torch.bfloat16 and INTERPRETED:
        reasons.append("the dtype is torch.bfloat16, which Triton's interpreter does not know")
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and _are_functorch_transforms_active():
        reasons.append("a transform of torch.func is active, which cannot differentiate the kernels")
    if head_dim not in HEAD_DIMS:
        reasons.append(f"a head has {head_dim} channels; the kernels take 16, 32 and 64")
    if dropout > 0:
        reasons.append(f"attention_probs_dropout_prob is {dropout}; the kernels do not drop probabilities")
    if window is not None and window[0] * window[1] > MAX_TOKENS:
        reasons.append(f"the window {window[0]}x{window[1]} has more than {MAX_TOKENS} tokens")
    return reasons


def triton_window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    table_window: Pair,
    geometry: WindowGeometry,
    num_heads: int,
    scaling: float,
    mask_padding: bool = False,
) -> Tensor:
    """Attend within each window of a padded map; the same as partition, shift, bias, mask, softmax and back.

    Opaque to ``torch.compile``, and differentiable once with respect to ``qkv`` and ``bias_table``. Under autocast it
    computes in autocast's dtype, as the matrix products around it do; the table is read in its own.

    Args:
        qkv: Queries, keys and values as the Linear layer leaves them, ``(B, Hp, Wp, 3 h d)``.
        bias_table: ``((2 Mh - 1)(2 Mw - 1), h)`` of ``table_window``.
        table_window: Window that the table was made for; at least the window that attends.
        geometry: How the map is cut and shifted.
        num_heads: Heads, h.
        scaling: ``1 / sqrt(d)``.
        mask_padding: Whether padded tokens are kept out of attention as keys and values.

    Returns:
        The attended map, ``(B, Hp, Wp, h d)``.

    Raises:
        ValueError: If the map or the table does not have the size that the geometry says.
        NotImplementedError: If the kernels cannot run here; the message gives every reason.
    """
    if qkv.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    (height, width), (table_height, table_width) = geometry.padded, table_window
    if qkv.ndim != 4 or qkv.shape[1:3] != geometry.padded or qkv.shape[3] % (3 * num_heads):
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; the geometry with {num_heads} heads needs "
            f"(B, {height}, {width}, 3 * {num_heads} * d): pad the map with pad_to_windows() before the qkv layer"
        )
    rows = (2 * table_height - 1) * (2 * table_width - 1)
    if bias_table.shape != (rows, num_heads):
        raise ValueError(
            f"the bias table has shape {tuple(bias_table.shape)}; a window of {table_height}x{table_width} with "
            f"{num_heads} heads has ({rows}, {num_heads}): resample it with resize_bias_table()"
        )
    if geometry.window[0] > table_height or geometry.window[1] > table_width:
        raise ValueError(
            f"the window {geometry.window} is larger than {table_window}, the window of the bias table: "
            "resample the table with resize_bias_table()"
        )
    reasons = reasons_against_triton(qkv.device, qkv.dtype, qkv.shape[3] // (3 * num_heads), 0.0, geometry.window)
    if reasons:
        raise NotImplementedError(f"the Triton kernels cannot run here: {'; '.join(reasons)}")
    sizes = (*geometry.grid, *geometry.window, *geometry.shift, *table_window)
    return _attend(qkv.contiguous(), bias_table, num_heads, sizes, scaling, mask_padding)


# One name for each copy of this module: a checkpoint from the Hub brings its own.
NAMESPACE = "swin_hf" if __name__.startswith("swin_hf.") else f"swin_hf_{zlib.crc32(__name__.encode()):08x}"


@torch.library.custom_op(f"{NAMESPACE}::window_attention", mutates_args=())
def _attend(
    qkv: Tensor, table: Tensor, num_heads: int, sizes: Sequence[int], scaling: float, mask_padding: bool
) -> Tensor:
    """:func:`triton_window_attention` for torch; ``sizes`` are those of grid, window, shift and table window."""
    problem = Problem(qkv, num_heads, sizes, scaling, mask_padding)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    if not out.numel():
        return out
    launch = problem.choose("forward")
    q_blocks, k_blocks = problem.blocks(launch)
    with torch.cuda.device_of(qkv):
        bias = problem.bias(table, launch)
        if k_blocks == 1:
            problem.run_tile(_forward_tile_kernel, launch, problem.splits(launch), qkv, bias, out)
        else:
            problem.run_blocks(_forward_block_kernel, launch, num_heads * q_blocks, qkv, bias, out)
    return out


@torch.library.custom_op(f"{NAMESPACE}::window_attention_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor,
    num_heads: int,
    sizes: Sequence[int],
    scaling: float,
    mask_padding: bool,
    need_table: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernels: the gradients of qkv and of the table, the latter empty unless needed."""
    problem = Problem(qkv, num_heads, sizes, scaling, mask_padding)
    grad_qkv, no_table = torch.empty_like(qkv), table.new_empty(0)
    if not qkv.numel():
        return grad_qkv, torch.zeros_like(table) if need_table else no_table
    launch = problem.choose("backward")
    q_blocks, k_blocks = problem.blocks(launch)
    with torch.cuda.device_of(qkv):
        bias = problem.bias(table, launch)
        if k_blocks == 1:
            splits = problem.splits(launch)
            partials = bias.new_empty(splits[3] if need_table else 0, *bias.shape[1:])
            problem.run_tile(
                _backward_tile_kernel, launch, splits, qkv, bias, grad_out, grad_qkv, partials, NEED_BIAS=need_table
            )
        else:
            stats = bias.new_empty(qkv[..., 0].numel() // problem.tokens, num_heads, 2, bias.shape[2])
            tensors = (qkv, bias, grad_out, grad_qkv, stats)
            problem.run_blocks(_backward_query_kernel, launch, num_heads * q_blocks, *tensors)
            problem.run_blocks(_backward_key_kernel, launch, num_heads * k_blocks, *tensors)
            if not need_table:
                return grad_qkv, no_table
            lanes = num_heads * q_blocks * k_blocks
            partials = bias.new_empty(problem.slots(lanes, launch), *bias.shape[1:])
            problem.run_blocks(_backward_bias_kernel, launch, lanes, qkv, bias, grad_out, partials, stats)
        return grad_qkv, problem.fold(partials, table) if need_table else no_table


@_attend.register_fake
def _(qkv: Tensor, table: Tensor, num_heads: int, *_: object) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@_attend_backward.register_fake
def _(grad_out: Tensor, qkv: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_table = rest[-1]
    return torch.empty_like(qkv), torch.empty_like(table) if need_table else table.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, table, *ctx.arguments = inputs
    ctx.save_for_backward(qkv, table)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    qkv, table = ctx.saved_tensors
    need_qkv, need_table = ctx.needs_input_grad[:2]
    grad_qkv, grad_table = _attend_backward(grad_out.contiguous(), qkv, table, *ctx.arguments, need_table)
    return grad_qkv if need_qkv else None, grad_table if need_table else None, *(None for _ in ctx.arguments)


_attend.register_autograd(_differentiate, setup_context=_save)
