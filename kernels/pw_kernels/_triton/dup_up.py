# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.dup_up_add`: one pass over h that gathers from x."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
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
    """h[o, t, y, w] += x[(((o FT + a) FS + b) FS + c) // REPEATS, t // FT, y // FS, w // FS].

    A program has one row of one frame of h, BLOCK_C channels and BLOCK_W columns of it; sizes
    are h's. (a, b, c) are the remainders of the three divisions, t counts the DROPPED frames.
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


def launch(h: Tensor, x: Tensor, time_factor: int, space_factor: int, first: bool) -> None:
    """Run the kernel; the input was checked by the caller."""
    batches, channels, frames, rows, columns = h.shape
    block_c, block_w = tile_shape(h)
    tiles = triton.cdiv(channels, block_c) * triton.cdiv(columns, block_w)
    kernel[(batches * frames * rows * tiles,)](
        h,
        x,
        channels,
        frames,
        rows,
        columns,
        *h.stride(),
        *x.stride(),
        FT=time_factor,
        FS=space_factor,
        REPEATS=channels * time_factor * space_factor**2 // x.shape[1],
        DROPPED=time_factor - 1 if first else 0,
        BLOCK_C=block_c,
        BLOCK_W=block_w,
        num_warps=4,
    )


def tile_shape(h: Tensor) -> tuple[int, int]:
    """Channels and columns of a tile of 1024 elements, longer along what is contiguous."""
    if h.stride(4) == 1:
        wide = min(256, max(32, triton.next_power_of_2(h.shape[4])))
        return 1024 // wide, wide
    return 128, 8
