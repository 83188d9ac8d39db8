# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.dup_up_add`: one pass over h that gathers from x."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["frames", "rows"])
def kernel(
    h_ptr,
    x_ptr,
    channels,
    frames,
    rows,
    columns,
    h_batch,
    h_channel,
    h_frame,
    h_row,
    h_column,
    x_batch,
    x_channel,
    x_frame,
    x_row,
    x_column,
    FT: tl.constexpr,
    FS: tl.constexpr,
    REPEATS: tl.constexpr,
    DROPPED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Add x[(((o FT + a) FS + b) FS + c) // REPEATS, t // FT, y // FS, w // FS] to h[o, t, y, w].

    A program has BLOCK_C channels and BLOCK_W columns of one row of one frame of h; sizes are h's.
    (a, b, c) are the remainders of the three divisions; t includes the DROPPED frames.
    """
    across = tl.cdiv(columns, BLOCK_W)
    tiles = across * tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    tile = program % tiles
    line = program // tiles
    row = line % rows
    frame = (line // rows) % frames
    batch = (line // rows) // frames
    o = (tile // across) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    w = (tile % across) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    inside = (o < channels) & (w < columns)
    whole = frame + DROPPED
    source = (((o * FT + whole % FT) * FS + row % FS) * FS + w % FS) // REPEATS
    # int64: every product with a stride may pass 2^31 at 4K.
    h_base = batch.to(tl.int64) * h_batch + frame.to(tl.int64) * h_frame + row.to(tl.int64) * h_row
    x_base = batch.to(tl.int64) * x_batch + (whole // FT).to(tl.int64) * x_frame
    x_base += (row // FS).to(tl.int64) * x_row
    h_at = h_ptr + h_base + o.to(tl.int64) * h_channel + w.to(tl.int64) * h_column
    x_at = x_ptr + x_base + source.to(tl.int64) * x_channel + (w // FS).to(tl.int64) * x_column
    h = tl.load(h_at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_at, (h + x).to(h_ptr.dtype.element_ty), mask=inside)
