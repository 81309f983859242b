"""Window attention as one fused kernel in each direction: a padded map goes in, a padded map comes out.

The plain way rolls the map, cuts it into windows, adds a bias and a mask to scores in memory, and undoes all of it.
Here a program looks its tokens up where they lie: token t of window (a, b) stands at row ``a Mh + t // Mw`` and
column ``b Mw + t % Mw`` of the shifted map, so the cyclic shift of the paper (figure 4) is an addition that wraps
around, for reading q, k, v and for writing the result alike. The mask is a comparison of two region numbers and
exists only where a program meets a border. Nothing of size N x N is ever in memory, except the bias once per head.

A program keeps one head and walks over the windows of the batch. Windows of up to 64 tokens are one tile. Larger
ones are cut into blocks of queries and keys, with a running softmax.

The backward recomputes the probabilities. The gradient of the bias is summed by each program in its own registers,
then over the programs in a fixed order: no atomics, hence the same bits in every run on the same machine.

Shape legend:
    B batch, Hp and Wp height and width of a padded map in tokens, nW windows of a map, N tokens of a window,
    Mh and Mw sides of a window, h heads, d channels of a head, Q and K tokens rounded up to whole blocks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

HEAD_DIMS = (16, 32, 64)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TOKENS = 1024  # of a window; the bias of a head then takes 4 MiB
INTERPRETED_PROGRAMS = 3  # instead of the multiprocessors: few, so that each walks over several windows


def _jit(function: Any) -> Any:
    """``triton.jit``, or the bare function where Triton is missing. Sizes that vary with the batch do not recompile."""
    if triton is None:
        return function
    runtime_sizes = {"num_windows", "grid_h", "grid_w", "padded_h", "padded_w", "shift_h", "shift_w"}
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in runtime_sizes])


# Device functions. `window` numbers the windows of the whole batch; `tokens` numbers tokens inside a window.


@_jit
def _locate(
    window, tokens, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH: tl.constexpr, MW: tl.constexpr
):
    """Where tokens of a window lie: offset in ``(B, Hp, Wp)`` as int64, region of the shifted map, is it padding."""
    windows_w = padded_w // MW
    per_map = (padded_h // MH) * windows_w
    image = window // per_map
    place = window % per_map
    row = (place // windows_w) * MH + tokens // MW
    column = (place % windows_w) * MW + tokens % MW
    # Two bits are enough for the nine regions of figure 4: the other borders coincide with borders of windows.
    region = tl.where(row >= padded_h - shift_h, 2, 0) + tl.where(column >= padded_w - shift_w, 1, 0)
    row += shift_h
    row = tl.where(row >= padded_h, row - padded_h, row)
    column += shift_w
    column = tl.where(column >= padded_w, column - padded_w, column)
    offset = (image.to(tl.int64) * padded_h + row) * padded_w + column
    return offset, region, (row >= grid_h) | (column >= grid_w)


@_jit
def _meets_border(window, padded_h, padded_w, shift_h, shift_w, MH: tl.constexpr, MW: tl.constexpr):
    """Whether a window of the shifted map holds more than one region: only those of the last row and column do."""
    windows_w = padded_w // MW
    windows_h = padded_h // MH
    place = window % (windows_h * windows_w)
    last_row = (place // windows_w) == windows_h - 1
    last_column = (place % windows_w) == windows_w - 1
    return ((shift_h > 0) & last_row) | ((shift_w > 0) & last_column)


@_jit
def _load_rows(pointer, offsets, stride, column, real, D: tl.constexpr):
    """Load ``(tokens, d)`` of one head; tokens that only fill up the block are 0, whatever lies in memory."""
    dims = tl.arange(0, D)
    return tl.load(
        pointer + offsets[:, None] * stride + column + dims[None, :], mask=real[:, None], other=0.0
    )


@_jit
def _store_rows(pointer, offsets, stride, column, real, rows, D: tl.constexpr):
    """Store ``(tokens, d)`` of one head in the dtype of the tensor."""
    dims = tl.arange(0, D)
    where = pointer + offsets[:, None] * stride + column + dims[None, :]
    tl.store(where, rows.to(pointer.dtype.element_ty), mask=real[:, None])


@_jit
def _mask(scores, query_region, key_region, key_padding, meets_border, SHIFTED: tl.constexpr,
          MASK_PADDING: tl.constexpr):  # fmt: skip
    """Add ``masked`` to pairs of different regions. Padded keys, if masked, are finite, so that no row is NaN."""
    if SHIFTED:
        if meets_border:
            scores += tl.where(query_region[:, None] != key_region[None, :], masked, 0.0)
    if MASK_PADDING:
        scores = tl.where(key_padding[None, :], -1.0e30, scores)
    return scores


@_jit
def _forward_kernel(
    qkv, bias, out, num_windows, num_heads, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, scale,
    MH: tl.constexpr, MW: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend. A program has one head and one block of queries, and walks over windows.

    Neighbouring programs have neighbouring blocks, then heads, of the same window: they share its cache lines.

    Args:
        qkv: ``(B, Hp, Wp, 3, h, d)``.
        bias: ``(h, Q, K)`` float32 in units of log2, -inf in columns from N on.
        out: ``(B, Hp, Wp, h, d)``; every element is written.
        scale: ``1 / sqrt(d)``. Scores, probabilities and sums are float32.
    """
    N: tl.constexpr = MH * MW
    Q_BLOCKS: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    Q: tl.constexpr = Q_BLOCKS * BLOCK_Q
    K: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K * BLOCK_K

    lanes = num_heads * Q_BLOCKS
    lane = tl.program_id(0) % lanes
    head = lane // Q_BLOCKS
    queries = (lane % Q_BLOCKS) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    stride = num_heads * (3 * D)
    bias += head * (Q * K)
    if K == BLOCK_K:
        bias_tile = tl.load(bias + queries[:, None] * K + keys[None, :])

    first = tl.program_id(0) // lanes
    step = tl.num_programs(0) // lanes
    for window in tl.range(first, num_windows, step, num_stages=STAGES):
        q_offsets, q_region, _ = _locate(
            window, queries, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH, MW
        )
        border = _meets_border(window, padded_h, padded_w, shift_h, shift_w, MH, MW)
        q = _load_rows(qkv, q_offsets, stride, head * D, queries < N, D)
        if K == BLOCK_K:
            k_offsets, k_region, k_padding = _locate(
                window, keys, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH, MW
            )
            k = _load_rows(qkv, k_offsets, stride, (num_heads + head) * D, keys < N, D)
            v = _load_rows(qkv, k_offsets, stride, (2 * num_heads + head) * D, keys < N, D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * TO_LOG2) + bias_tile
            scores = _mask(scores, q_region, k_region, k_padding, border, SHIFTED, MASK_PADDING)
            weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
            total = tl.sum(weights, 1)
            attended = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        else:
            highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            total = tl.full([BLOCK_Q], 0.0, tl.float32)
            attended = tl.full([BLOCK_Q, D], 0.0, tl.float32)
            for start in range(0, K, BLOCK_K):
                k_offsets, k_region, k_padding = _locate(
                    window, start + keys, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH, MW
                )
                k = _load_rows(qkv, k_offsets, stride, (num_heads + head) * D, start + keys < N, D)
                v = _load_rows(qkv, k_offsets, stride, (2 * num_heads + head) * D, start + keys < N, D)
                block = tl.load(bias + queries[:, None] * K + (start + keys)[None, :])
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * TO_LOG2) + block
                scores = _mask(scores, q_region, k_region, k_padding, border, SHIFTED, MASK_PADDING)
                higher = tl.maximum(highest, tl.max(scores, 1))
                correction = tl.exp2(highest - higher)
                weights = tl.exp2(scores - higher[:, None])
                total = total * correction + tl.sum(weights, 1)
                attended = attended * correction[:, None]
                attended += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
                highest = higher
        attended = attended / total[:, None]
        _store_rows(out, q_offsets, num_heads * D, head * D, queries < N, attended, D)


@_jit
def _backward_kernel(
    qkv, bias, grad_out, grad_qkv, partials, num_windows, num_heads, grid_h, grid_w, padded_h, padded_w, shift_h,
    shift_w, scale, MH: tl.constexpr, MW: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, NEED_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient for windows of one tile. A program has one head and walks over windows; each is read and written once.

    Args:
        qkv: ``(B, Hp, Wp, 3, h, d)``.
        bias: ``(h, K, K)`` float32 in units of log2, -inf in columns from N on.
        grad_out: ``(B, Hp, Wp, h, d)``.
        grad_qkv: ``(B, Hp, Wp, 3, h, d)``; every element is written.
        partials: ``(programs / h, h, K, K)`` float32, the gradient of the bias as far as each program saw it.
        scale: ``1 / sqrt(d)``. Scores, probabilities, their gradients and all sums are float32.
    """
    N: tl.constexpr = MH * MW
    head = tl.program_id(0) % num_heads
    tokens = tl.arange(0, BLOCK_Q)
    real = tokens < N
    stride = num_heads * (3 * D)
    inner = tokens[:, None] * BLOCK_K + tokens[None, :]
    bias_tile = tl.load(bias + head * (BLOCK_Q * BLOCK_K) + inner)
    if NEED_BIAS:
        grad_bias = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)

    first = tl.program_id(0) // num_heads
    step = tl.num_programs(0) // num_heads
    for window in tl.range(first, num_windows, step, num_stages=STAGES):
        offsets, region, padding = _locate(
            window, tokens, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH, MW
        )
        border = _meets_border(window, padded_h, padded_w, shift_h, shift_w, MH, MW)
        q = _load_rows(qkv, offsets, stride, head * D, real, D)
        k = _load_rows(qkv, offsets, stride, (num_heads + head) * D, real, D)
        v = _load_rows(qkv, offsets, stride, (2 * num_heads + head) * D, real, D)
        grad = _load_rows(grad_out, offsets, num_heads * D, head * D, real, D)

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * TO_LOG2) + bias_tile
        scores = _mask(scores, region, region, padding, border, SHIFTED, MASK_PADDING)
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
def _backward_query_kernel(
    qkv, bias, grad_out, grad_qkv, stats, num_windows, num_heads, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w,
    scale, MH: tl.constexpr, MW: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of q for windows of several blocks, and what the other two kernels need to know of each query.

    A program has one head and one block of queries, and walks over windows. Arguments as in
    :func:`_backward_kernel`, and:

    Args:
        bias: ``(h, Q, K)``.
        stats: ``(B * nW, h, 2, Q)`` float32: log2 of the softmax's denominator, and the mean of the gradient of the
            probabilities under the probabilities themselves.
    """
    N: tl.constexpr = MH * MW
    Q_BLOCKS: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    Q: tl.constexpr = Q_BLOCKS * BLOCK_Q
    K: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K * BLOCK_K

    lanes = num_heads * Q_BLOCKS
    lane = tl.program_id(0) % lanes
    head = lane // Q_BLOCKS
    queries = (lane % Q_BLOCKS) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = tl.arange(0, BLOCK_K)
    stride = num_heads * (3 * D)
    bias += head * (Q * K)

    first = tl.program_id(0) // lanes
    step = tl.num_programs(0) // lanes
    for window in tl.range(first, num_windows, step):
        q_offsets, q_region, _ = _locate(
            window, queries, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH, MW
        )
        border = _meets_border(window, padded_h, padded_w, shift_h, shift_w, MH, MW)
        q = _load_rows(qkv, q_offsets, stride, head * D, queries < N, D)
        grad = _load_rows(grad_out, q_offsets, num_heads * D, head * D, queries < N, D)

        highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.full([BLOCK_Q], 0.0, tl.float32)
        mean = tl.full([BLOCK_Q], 0.0, tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k_offsets, k_region, k_padding = _locate(
                window, start + keys, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH, MW
            )
            k = _load_rows(qkv, k_offsets, stride, (num_heads + head) * D, start + keys < N, D)
            v = _load_rows(qkv, k_offsets, stride, (2 * num_heads + head) * D, start + keys < N, D)
            block = tl.load(bias + queries[:, None] * K + (start + keys)[None, :])
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * TO_LOG2) + block
            scores = _mask(scores, q_region, k_region, k_padding, border, SHIFTED, MASK_PADDING)
            higher = tl.maximum(highest, tl.max(scores, 1))
            correction = tl.exp2(highest - higher)
            weights = tl.exp2(scores - higher[:, None])
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            total = total * correction + tl.sum(weights, 1)
            mean = mean * correction + tl.sum(weights * grad_weights, 1)
            highest = higher
        normaliser = highest + tl.log2(total)
        mean = mean / total
        record = stats + (window.to(tl.int64) * num_heads + head) * (2 * Q) + queries
        tl.store(record, normaliser)
        tl.store(record + Q, mean)

        grad_q = tl.full([BLOCK_Q, D], 0.0, tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k_offsets, k_region, k_padding = _locate(
                window, start + keys, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH, MW
            )
            k = _load_rows(qkv, k_offsets, stride, (num_heads + head) * D, start + keys < N, D)
            v = _load_rows(qkv, k_offsets, stride, (2 * num_heads + head) * D, start + keys < N, D)
            block = tl.load(bias + queries[:, None] * K + (start + keys)[None, :])
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * TO_LOG2) + block
            scores = _mask(scores, q_region, k_region, k_padding, border, SHIFTED, MASK_PADDING)
            weights = tl.exp2(scores - normaliser[:, None])
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - mean[:, None])
            grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
        _store_rows(grad_qkv, q_offsets, stride, head * D, queries < N, grad_q * scale, D)


@_jit
def _backward_key_kernel(
    qkv, bias, grad_out, grad_qkv, stats, num_windows, num_heads, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w,
    scale, MH: tl.constexpr, MW: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SHIFTED: tl.constexpr, MASK_PADDING: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v for windows of several blocks: one head and one block of keys, walking over windows.

    Arguments as in :func:`_backward_query_kernel`, which has filled ``stats``.
    """
    N: tl.constexpr = MH * MW
    K_BLOCKS: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K
    Q: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    K: tl.constexpr = K_BLOCKS * BLOCK_K

    lanes = num_heads * K_BLOCKS
    lane = tl.program_id(0) % lanes
    head = lane // K_BLOCKS
    keys = (lane % K_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
    queries = tl.arange(0, BLOCK_Q)
    stride = num_heads * (3 * D)
    bias += head * (Q * K)

    first = tl.program_id(0) // lanes
    step = tl.num_programs(0) // lanes
    for window in tl.range(first, num_windows, step):
        k_offsets, k_region, k_padding = _locate(
            window, keys, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH, MW
        )
        border = _meets_border(window, padded_h, padded_w, shift_h, shift_w, MH, MW)
        k = _load_rows(qkv, k_offsets, stride, (num_heads + head) * D, keys < N, D)
        v = _load_rows(qkv, k_offsets, stride, (2 * num_heads + head) * D, keys < N, D)
        grad_k = tl.full([BLOCK_K, D], 0.0, tl.float32)
        grad_v = tl.full([BLOCK_K, D], 0.0, tl.float32)
        for start in tl.range(0, Q, BLOCK_Q, num_stages=STAGES):
            q_offsets, q_region, _ = _locate(
                window, start + queries, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH, MW
            )
            q = _load_rows(qkv, q_offsets, stride, head * D, start + queries < N, D)
            grad = _load_rows(grad_out, q_offsets, num_heads * D, head * D, start + queries < N, D)
            block = tl.load(bias + (start + queries)[:, None] * K + keys[None, :])
            record = stats + (window.to(tl.int64) * num_heads + head) * (2 * Q) + start + queries
            normaliser = tl.load(record)
            mean = tl.load(record + Q)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * TO_LOG2) + block
            scores = _mask(scores, q_region, k_region, k_padding, border, SHIFTED, MASK_PADDING)
            weights = tl.exp2(scores - normaliser[:, None])
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

    Arguments as in :func:`_backward_query_kernel`, which has filled ``stats``, and:

    Args:
        partials: ``(programs / (h * tiles), h, Q, K)`` float32.
    """
    N: tl.constexpr = MH * MW
    Q_BLOCKS: tl.constexpr = (N + BLOCK_Q - 1) // BLOCK_Q
    K_BLOCKS: tl.constexpr = (N + BLOCK_K - 1) // BLOCK_K
    Q: tl.constexpr = Q_BLOCKS * BLOCK_Q
    K: tl.constexpr = K_BLOCKS * BLOCK_K

    lanes = num_heads * (Q_BLOCKS * K_BLOCKS)
    lane = tl.program_id(0) % lanes
    head = lane // (Q_BLOCKS * K_BLOCKS)
    queries = (lane // K_BLOCKS) % Q_BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = (lane % K_BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
    stride = num_heads * (3 * D)
    inner = head * (Q * K) + queries[:, None] * K + keys[None, :]
    block = tl.load(bias + inner)
    grad_bias = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)

    first = tl.program_id(0) // lanes
    step = tl.num_programs(0) // lanes
    for window in tl.range(first, num_windows, step, num_stages=STAGES):
        q_offsets, q_region, _ = _locate(
            window, queries, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH, MW
        )
        k_offsets, k_region, k_padding = _locate(
            window, keys, grid_h, grid_w, padded_h, padded_w, shift_h, shift_w, MH, MW
        )
        border = _meets_border(window, padded_h, padded_w, shift_h, shift_w, MH, MW)
        q = _load_rows(qkv, q_offsets, stride, head * D, queries < N, D)
        k = _load_rows(qkv, k_offsets, stride, (num_heads + head) * D, keys < N, D)
        v = _load_rows(qkv, k_offsets, stride, (2 * num_heads + head) * D, keys < N, D)
        grad = _load_rows(grad_out, q_offsets, num_heads * D, head * D, queries < N, D)
        record = stats + (window.to(tl.int64) * num_heads + head) * (2 * Q) + queries
        normaliser = tl.load(record)
        mean = tl.load(record + Q)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * TO_LOG2) + block
        scores = _mask(scores, q_region, k_region, k_padding, border, SHIFTED, MASK_PADDING)
        weights = tl.exp2(scores - normaliser[:, None])
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_bias += weights * (grad_weights - mean[:, None])
    tl.store(partials + first.to(tl.int64) * (num_heads * (Q * K)) + inner, grad_bias)


@_jit
def _expand_bias_kernel(
    table, bias, num_heads, elements, MH: tl.constexpr, MW: tl.constexpr, TABLE_H: tl.constexpr, TABLE_W: tl.constexpr,
    Q: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Look up the bias of every pair of tokens: a program fills BLOCK elements.

    Args:
        table: ``((2 TABLE_H - 1)(2 TABLE_W - 1), h)``, any floating dtype.
        bias: ``(h, Q, K)`` float32 in units of log2; -inf in columns from N on, which keeps keys that only fill up
            a block out of the softmax; 0 in the other elements from N on.
        elements: ``h Q K``.
    """
    N: tl.constexpr = MH * MW
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head = element // (Q * K)
    query = element // K % Q
    key = element % K
    row = query // MW - key // MW + (TABLE_H - 1)
    column = query % MW - key % MW + (TABLE_W - 1)
    inside = (element < elements) & (query < N) & (key < N)
    value = tl.load(table + (row * (2 * TABLE_W - 1) + column) * num_heads + head, mask=inside, other=0.0)
    value = value.to(tl.float32) * TO_LOG2
    tl.store(bias + element, tl.where(key < N, value, float("-inf")), mask=element < elements)


@_jit
def _fold_bias_kernel(
    grad_bias, grad_table, num_heads, MH: tl.constexpr, MW: tl.constexpr, TABLE_H: tl.constexpr, TABLE_W: tl.constexpr,
    Q: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of all pairs of tokens that share an entry: a program sums one entry of one head.

    Args:
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

    def padded(self, tokens: int) -> Pair:
        """Q and K, the tokens of a window rounded up to whole blocks."""
        return -(-tokens // self.block_q) * self.block_q, -(-tokens // self.block_k) * self.block_k

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "enable_fp_fusion": True,  # Triton 3.10 turns it off unless told
        }


def _launch(kernel: str, tokens: int, head_dim: int, dtype: torch.dtype) -> Launch:
    """The table of sizes, chosen so that no kernel spills registers; see ``tests/test_attention_triton.py``."""
    wide = dtype == torch.float32
    if tokens <= 64:
        block = max(16, triton.next_power_of_2(tokens))
        return Launch(block, block, 4, 1 if wide else 2, 2)
    return Launch(64, 32, 4, 1 if wide else 2, 2)


def _count(qkv: Tensor, window: Sequence[int]) -> Pair:
    """Tokens of a window, and windows of the batch."""
    batch, height, width, _ = qkv.shape
    return window[0] * window[1], batch * (height // window[0]) * (width // window[1])


def _sizes(
    qkv: Tensor, num_windows: int, num_heads: int, grid: Sequence[int], shift: Sequence[int]
) -> tuple[int, ...]:
    """The sizes that every kernel takes, in its order."""
    return num_windows, num_heads, *grid, qkv.shape[1], qkv.shape[2], *shift


def _constants(
    qkv: Tensor, head_dim: int, window: Sequence[int], shift: Sequence[int], mask_padding: bool
) -> dict[str, int | bool | str]:
    """What every kernel is compiled for."""
    return {
        "MH": window[0],
        "MW": window[1],
        "D": head_dim,
        "SHIFTED": tuple(shift) != (0, 0),
        "MASK_PADDING": mask_padding,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
    }


def _expand_bias(
    table: Tensor, window: Sequence[int], table_window: Sequence[int], queries: int, keys: int
) -> Tensor:
    """The bias of every pair of tokens as the kernels read it, ``(h, Q, K)`` float32."""
    table = table.contiguous()
    num_heads = table.shape[1]
    bias = table.new_empty(num_heads, queries, keys, dtype=torch.float32)
    _expand_bias_kernel[(triton.cdiv(bias.numel(), 1024),)](
        table, bias, num_heads, bias.numel(), *window, *table_window, queries, keys, BLOCK=1024
    )
    return bias


def _fold_bias(
    grad_bias: Tensor, table: Tensor, window: Sequence[int], table_window: Sequence[int]
) -> Tensor:
    """The gradient of the table from that of every pair of tokens, float32."""
    grad_table = torch.empty_like(table, dtype=torch.float32, memory_format=torch.contiguous_format)
    _, queries, keys = grad_bias.shape
    block = triton.next_power_of_2(window[0] * window[1])
    _fold_bias_kernel[(table.numel(),)](
        grad_bias, grad_table, table.shape[1], *window, *table_window, queries, keys, BLOCK=block
    )
    return grad_table


def _interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` was set when this module was imported: kernels then run on CPU, in Python."""
    return triton is not None and not isinstance(_forward_kernel, triton.JITFunction)


def _programs(device: torch.device, lanes: int, num_windows: int, occupancy: int) -> int:
    """Number of programs: a multiple of ``lanes``, about one wave, never more than there are windows to walk over."""
    if device.type == "cpu":
        wave = INTERPRETED_PROGRAMS
    else:
        wave = torch.cuda.get_device_properties(device).multi_processor_count * occupancy
    return lanes * max(1, min(num_windows, wave // lanes))


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
    elif device.type != "cpu" or not _interpreted():
        reasons.append(f"the device is {device.type}; the kernels need CUDA")
    if dtype not in DTYPES:
        reasons.append(f"the dtype is {dtype}; the kernels take float16, bfloat16 and float32")
    elif dtype == torch.bfloat16 and _interpreted():
        reasons.append("the dtype is torch.bfloat16, which Triton's interpreter does not know")
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
    if torch.is_autocast_enabled(qkv.device.type):
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
    reasons = reasons_against_triton(
        qkv.device, qkv.dtype, qkv.shape[3] // (3 * num_heads), 0.0, geometry.window
    )
    if reasons:
        raise NotImplementedError(f"the Triton kernels cannot run here: {'; '.join(reasons)}")
    attended: Tensor = _attend(
        qkv.contiguous(),
        bias_table,
        num_heads,
        geometry.grid,
        geometry.window,
        geometry.shift,
        table_window,
        scaling,
        mask_padding,
    )
    return attended


# One name for each copy of this module: a checkpoint from the Hub brings its own, beside the installed package.
NAMESPACE = "swin_hf" if __name__.startswith("swin_hf.") else f"swin_hf_{zlib.crc32(__name__.encode()):08x}"


@torch.library.custom_op(f"{NAMESPACE}::window_attention", mutates_args=())
def _attend(
    qkv: Tensor,
    table: Tensor,
    num_heads: int,
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    table_window: Sequence[int],
    scaling: float,
    mask_padding: bool,
) -> Tensor:
    """Launch the forward kernels; arguments as in :func:`triton_window_attention`."""
    head_dim = qkv.shape[3] // (3 * num_heads)
    tokens, num_windows = _count(qkv, window)
    launch = _launch("forward", tokens, head_dim, qkv.dtype)
    queries, keys = launch.padded(tokens)
    out = qkv.new_empty(*qkv.shape[:3], num_heads * head_dim)
    with torch.cuda.device_of(qkv):
        bias = _expand_bias(table, window, table_window, queries, keys)
        lanes = num_heads * (queries // launch.block_q)
        _forward_kernel[(_programs(qkv.device, lanes, num_windows, launch.occupancy),)](
            qkv,
            bias,
            out,
            *_sizes(qkv, num_windows, num_heads, grid, shift),
            scaling,
            **_constants(qkv, head_dim, window, shift, mask_padding),
            **launch.options(),
        )
    return out


@torch.library.custom_op(f"{NAMESPACE}::window_attention_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor,
    num_heads: int,
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    table_window: Sequence[int],
    scaling: float,
    mask_padding: bool,
    need_table: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernels: the gradients of qkv and of the table, the latter empty unless needed."""
    head_dim = qkv.shape[3] // (3 * num_heads)
    tokens, num_windows = _count(qkv, window)
    sizes = (*_sizes(qkv, num_windows, num_heads, grid, shift), scaling)
    constants = _constants(qkv, head_dim, window, shift, mask_padding)
    launch = _launch("backward", tokens, head_dim, qkv.dtype)
    queries, keys = launch.padded(tokens)
    grad_qkv = torch.empty_like(qkv)
    partials = None
    with torch.cuda.device_of(qkv):
        bias = _expand_bias(table, window, table_window, queries, keys)
        if queries == launch.block_q and keys == launch.block_k:
            programs = _programs(qkv.device, num_heads, num_windows, launch.occupancy)
            partials = bias.new_empty(programs // num_heads if need_table else 0, *bias.shape)
            _backward_kernel[(programs,)](
                qkv,
                bias,
                grad_out,
                grad_qkv,
                partials,
                *sizes,
                NEED_BIAS=need_table,
                **constants,
                **launch.options(),
            )
        else:
            stats = bias.new_empty(num_windows, num_heads, 2, queries)
            for kernel, lanes in (
                (_backward_query_kernel, num_heads * (queries // launch.block_q)),
                (_backward_key_kernel, num_heads * (keys // launch.block_k)),
            ):
                programs = _programs(qkv.device, lanes, num_windows, launch.occupancy)
                kernel[(programs,)](
                    qkv, bias, grad_out, grad_qkv, stats, *sizes, **constants, **launch.options()
                )
            if need_table:
                lanes = num_heads * (queries // launch.block_q) * (keys // launch.block_k)
                programs = _programs(qkv.device, lanes, num_windows, launch.occupancy)
                partials = bias.new_empty(programs // lanes, *bias.shape)
                _backward_bias_kernel[(programs,)](
                    qkv, bias, grad_out, partials, stats, *sizes, **constants, **launch.options()
                )
        if not need_table:
            return grad_qkv, table.new_empty(0)
        grad_table = _fold_bias(partials.sum(0), table, window, table_window)
    return grad_qkv, grad_table.to(table.dtype)


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
