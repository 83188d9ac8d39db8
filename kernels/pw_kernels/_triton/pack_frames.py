# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.pack_frames`: planes of colours to interleaved bytes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kernel(video_ptr, out_ptr, pixels, TRUNCATE: tl.constexpr, BLOCK: tl.constexpr):
    """out[3 p + colour] = byte of video[colour, p].

    Programs walk the bytes in their order, so that stores are wide; the three planes are read
    through the cache.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK  # int64: three planes may pass 2^31
    for third in tl.static_range(3):
        at = third * BLOCK + tl.arange(0, BLOCK)
        place, pixel = 3 * start + at, start + at // 3
        inside = place < 3 * pixels  # of the bytes, so that a mask covers whole words of them
        plane = (at % 3).to(tl.int64) * pixels
        value = tl.load(video_ptr + plane + pixel, mask=inside, other=0.0)
        scaled = (value + 1.0) * 0.5 * 255.0
        scaled = tl.minimum(tl.maximum(scaled, 0.0), 255.0)
        if not TRUNCATE:
            # Adding 1.5 * 2^23 leaves no fraction bits: fp32 itself rounds, half to even.
            scaled = (scaled + 12582912.0) - 12582912.0
        tl.store(out_ptr + place, scaled.to(tl.int32).to(tl.uint8), mask=inside)
