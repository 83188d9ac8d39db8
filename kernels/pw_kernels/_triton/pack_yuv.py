# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.pack_yuv`: 2x2 pixel blocks to luma and chroma in one pass."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _value(at, weight, inside, WEIGHTED: tl.constexpr):
    """Load one value of each block, in [0, 1]."""
    value = tl.load(at, mask=inside, other=0.0)
    if WEIGHTED:
        value = tl.div_rn(value, weight)
    return (tl.minimum(tl.maximum(value, -1.0), 1.0) + 1.0) * 0.5


@triton.jit
def _sample(level, BITS: tl.constexpr, like: tl.constexpr):
    """Round an 8-bit level to `BITS` bits, half to even; 10 bits go into the upper bits of 16."""
    # adding 1.5 * 2^23 leaves no fraction bits: fp32 rounds
    rounded = (level * (1 << (BITS - 8)) + 12582912.0) - 12582912.0
    whole = rounded.to(tl.int32)
    return (whole * 64 if BITS == 10 else whole).to(like)


@triton.jit
def kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    columns,
    x_channel,
    x_frame,
    x_row,
    x_column,
    WEIGHTED: tl.constexpr,
    PLANAR: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute Y, U and V of BLOCK blocks of one row of blocks; sizes are of the grid of blocks.

    Channel (colour 2 + column) 2 + row of x. A frame of out has 2 rows 2 columns samples of Y, then
    the planes U and V, or U and V interleaved.
    """
    row, frame = tl.program_id(1), tl.program_id(2)
    rows = tl.num_programs(1)
    start = tl.program_id(0) * BLOCK
    column = start + tl.arange(0, BLOCK)
    inside = column < columns
    left, right = 1.0, 1.0
    if WEIGHTED:
        left = tl.load(weight_ptr + 2 * column, mask=inside, other=1.0)
        right = tl.load(weight_ptr + 2 * column + 1, mask=inside, other=1.0)
    # int64: a chunk's values and samples may pass 2^31.
    x_ptr += frame.to(tl.int64) * x_frame + row.to(tl.int64) * x_row
    block_ptr = x_ptr + column.to(tl.int64) * x_column
    upper_left = tl.zeros([BLOCK], tl.float32)
    upper_right = tl.zeros([BLOCK], tl.float32)
    lower_left = tl.zeros([BLOCK], tl.float32)
    lower_right = tl.zeros([BLOCK], tl.float32)
    grey = tl.zeros([BLOCK], tl.float32)
    red = tl.zeros([BLOCK], tl.float32)
    blue = tl.zeros([BLOCK], tl.float32)
    for colour in tl.static_range(3):
        share = 0.2126 if colour == 0 else (0.7152 if colour == 1 else 0.0722)
        at = block_ptr + tl.cast(4 * colour, tl.int64) * x_channel
        a = _value(at, left, inside, WEIGHTED)
        b = _value(at + tl.cast(2, tl.int64) * x_channel, right, inside, WEIGHTED)
        c = _value(at + x_channel, left, inside, WEIGHTED)
        d = _value(at + tl.cast(3, tl.int64) * x_channel, right, inside, WEIGHTED)
        upper_left += share * a
        upper_right += share * b
        lower_left += share * c
        lower_right += share * d
        mean = (a + b + c + d) * 0.25
        grey += share * mean
        if colour == 0:
            red = mean
        if colour == 2:
            blue = mean
    u = 128.0 + 224.0 / 1.8556 * (blue - grey)
    v = 128.0 + 224.0 / 1.5748 * (red - grey)

    like: tl.constexpr = out_ptr.dtype.element_ty
    out_ptr += frame.to(tl.int64) * rows * columns * 6
    twice = 2 * start + tl.arange(0, 2 * BLOCK)
    both = twice < 2 * columns
    upper_ptr = out_ptr + row.to(tl.int64) * 4 * columns + twice
    upper = tl.interleave(
        _sample(16.0 + 219.0 * upper_left, BITS, like),
        _sample(16.0 + 219.0 * upper_right, BITS, like),
    )
    lower = tl.interleave(
        _sample(16.0 + 219.0 * lower_left, BITS, like),
        _sample(16.0 + 219.0 * lower_right, BITS, like),
    )
    tl.store(upper_ptr, upper, mask=both)
    tl.store(upper_ptr + 2 * columns, lower, mask=both)
    u, v = _sample(u, BITS, like), _sample(v, BITS, like)
    chroma_ptr = out_ptr + rows.to(tl.int64) * 4 * columns
    if PLANAR:
        u_ptr = chroma_ptr + row.to(tl.int64) * columns + column
        tl.store(u_ptr, u, mask=inside)
        tl.store(u_ptr + rows.to(tl.int64) * columns, v, mask=inside)
    else:
        chroma = tl.interleave(u, v)
        tl.store(chroma_ptr + row.to(tl.int64) * 2 * columns + twice, chroma, mask=both)
