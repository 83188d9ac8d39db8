# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.channel_norm`: a tile of positions per program, one pass."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kernel(
    x_ptr,
    gamma_ptr,
    out_ptr,
    positions,
    x_batch,
    x_frame,
    x_position,
    x_channel,
    out_batch,
    out_frame,
    out_position,
    out_channel,
    root,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SILU: tl.constexpr,
):
    """Compute out[:, p] = x[:, p] / max(|x[:, p]|, 1e-12) * root * gamma, then SiLU.

    Either the positions or the channels of x have stride 1, and likewise of out, not always the
    same: channels-first input may leave as channels last.
    """
    # int64 throughout: a channel times the positions of a 4K chunk passes 2^31.
    position = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    frame, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    x_ptr += batch * x_batch + frame * x_frame
    out_ptr += batch * out_batch + frame * out_frame
    channel = tl.arange(0, BLOCK_C)[:, None]
    inside = (channel < C) & (position < positions)
    x_offset = position * x_position + channel.to(tl.int64) * x_channel
    out_offset = position * out_position + channel.to(tl.int64) * out_channel
    x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, axis=0))
    scale = root / tl.maximum(norm, 1e-12)
    gamma = tl.load(gamma_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    result = x * scale[None, :] * gamma
    if SILU:
        result = result / (1.0 + tl.exp(-result))
    out = result.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offset, out, mask=inside)
