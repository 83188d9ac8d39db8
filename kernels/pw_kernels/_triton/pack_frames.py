# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.pack_frames`: 2x2 pixel blocks to interleaved bytes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    width,
    x_channel,
    x_frame,
    x_row,
    x_column,
    WEIGHTED: tl.constexpr,
    TRUNCATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Convert x[(2 c + x % 2) 2 + y % 2, frame, y // 2, x // 2] to the byte out[frame, y, x, c].

    A program has BLOCK pixels of one row and writes their bytes in order, so that stores are wide;
    the twelve channels are read through the cache.
    """
    row, frame = tl.program_id(1), tl.program_id(2)
    rows = tl.num_programs(1)
    start = tl.program_id(0) * BLOCK
    # int64: a chunk's values and bytes may pass 2^31.
    x_ptr += frame.to(tl.int64) * x_frame + (row // 2).to(tl.int64) * x_row
    out_ptr += (frame.to(tl.int64) * rows + row) * width * 3
    for third in tl.static_range(3):
        at = third * BLOCK + tl.arange(0, BLOCK)
        byte, pixel = 3 * start + at, start + at // 3
        inside = byte < 3 * width  # of bytes, so that a mask covers whole words
        channel = (at % 3 * 2 + pixel % 2) * 2 + row % 2
        offset = channel.to(tl.int64) * x_channel + (pixel // 2).to(tl.int64) * x_column
        value = tl.load(x_ptr + offset, mask=inside, other=0.0)
        if WEIGHTED:
            value = tl.div_rn(value, tl.load(weight_ptr + pixel, mask=inside, other=1.0))
        value = tl.minimum(tl.maximum(value, -1.0), 1.0)
        scaled = (value + 1.0) * 0.5 * 255.0
        if not TRUNCATE:
            # adding 1.5 * 2^23 leaves no fraction bits: fp32 rounds, half to even
            scaled = (scaled + 12582912.0) - 12582912.0
        tl.store(out_ptr + byte, scaled.to(tl.int32).to(tl.uint8), mask=inside)
