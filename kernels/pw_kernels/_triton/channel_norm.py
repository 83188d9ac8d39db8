# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.channel_norm`: a tile of positions per program, one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pw_kernels.channel_norm import as_clip, channels_last

TILE = 16384  # elements a program keeps in registers: 64 a thread with 8 warps


@triton.jit
def kernel(
    x_ptr,
    gamma_ptr,
    out_ptr,
    positions,
    x_batch,
    x_frame,
    x_row,
    out_batch,
    out_frame,
    out_row,
    root,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    """out[:, p] = x[:, p] / max(|x[:, p]|, 1e-12) * root * gamma, then SiLU.

    `x_row` is the stride between positions where channels are last, else between channels; the
    other of the two has stride 1.
    """
    # int64 throughout: a channel times the positions of a 4K chunk passes 2^31.
    position = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    frame, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    x_ptr += batch * x_batch + frame * x_frame
    out_ptr += batch * out_batch + frame * out_frame
    channel = tl.arange(0, BLOCK_C)[:, None]
    inside = (channel < C) & (position < positions)
    if LAST:
        x_offset = position * x_row + channel
        out_offset = position * out_row + channel
    else:
        x_offset = channel.to(tl.int64) * x_row + position
        out_offset = channel.to(tl.int64) * out_row + position
    x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, axis=0))
    scale = root / tl.maximum(norm, 1e-12)
    gamma = tl.load(gamma_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    result = x * scale[None, :] * gamma
    if SILU:
        result = result / (1.0 + tl.exp(-result))
    out = result.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offset, out, mask=inside)


def launch(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """Run the kernel; the input was checked by the caller."""
    out = torch.empty_like(x)
    clip, last = as_clip(x), channels_last(as_clip(x))
    assert last is not None
    strides, out_strides = _strides(clip, last), _strides(as_clip(out), last)
    assert out_strides is not None
    if strides is None:
        clip, strides = as_clip(torch.empty_like(x).copy_(x)), out_strides
    batches, channels, frames, rows, columns = clip.shape
    block_c = triton.next_power_of_2(channels)
    block_p = tile_positions(block_c)
    kernel[(triton.cdiv(rows * columns, block_p), frames, batches)](
        clip,
        gamma,
        out,
        rows * columns,
        *strides,
        *out_strides,
        channels**0.5,
        C=channels,
        BLOCK_C=block_c,
        BLOCK_P=block_p,
        LAST=last,
        SILU=silu,
        num_warps=8,
    )
    return out


def tile_positions(block_c: int) -> int:
    """Positions of a tile: as many as registers hold, 16 of the widest."""
    return min(256, TILE // block_c)


def _strides(clip: Tensor, last: bool) -> tuple[int, int, int] | None:
    """Strides of batch, frame and row; None where the positions of a frame have no one stride."""
    batch, channel, frame, row, column = clip.stride()
    channels, rows, columns = clip.shape[1], *clip.shape[3:]
    if rows > 1 and columns > 1 and row != columns * column:
        return None
    step = column if columns > 1 else row
    if rows == columns == 1:
        step = channels if last else 1
    if last:
        return (batch, frame, step) if channel == 1 else None
    return (batch, frame, channel) if step == 1 else None
