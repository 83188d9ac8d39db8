# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.qk_norm_rope`: one program per token, queries and keys at once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_rope(
    x_ptr,
    weight_ptr,
    cos,
    sin,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Set x = rope(rms_norm(x)): one token, N heads of K channels; cos and sin [1, BLOCK_K/2]."""
    head, lane = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_K)[None, :]
    channel, inside = head * K + lane, (head < N) & (lane < K)
    stored = tl.load(x_ptr + channel, mask=inside, other=0.0)
    dtype = stored.dtype
    x = stored.to(tl.float32)
    square = tl.sum(tl.sum(x * x, axis=1), axis=0) / (N * K)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    # Rounded before and after the weight, as in WanRMSNorm.
    normed = (x * tl.rsqrt(square + eps)).to(dtype).to(tl.float32)
    normed = (normed * weight).to(dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(normed, (BLOCK_N, BLOCK_K // 2, 2)))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    tl.store(x_ptr + channel, tl.reshape(pairs, (BLOCK_N, BLOCK_K)).to(dtype), mask=inside)


@triton.jit
def kernel(
    q_ptr,
    k_ptr,
    weight_q_ptr,
    weight_k_ptr,
    cos_ptr,
    sin_ptr,
    origin_ptr,
    q_stride,
    k_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    T_PAIRS: tl.constexpr,
    H_PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Normalise and rotate one token of q and of k.

    The first T_PAIRS pairs of a head rotate with the frame, the next H_PAIRS with the row, the
    others with the column.
    """
    program = tl.program_id(0)
    # 32 bits: a clip has fewer tokens than 2^31.
    rows, columns = tl.load(origin_ptr + 1).to(tl.int32), tl.load(origin_ptr + 2).to(tl.int32)
    index = tl.load(origin_ptr).to(tl.int32) + program
    column, line = index % columns, index // columns
    row, frame = line % rows, line // rows
    pair = tl.arange(0, BLOCK_K // 2)
    position = tl.where(pair < T_PAIRS, frame, tl.where(pair < T_PAIRS + H_PAIRS, row, column))
    angle = position * (K // 2) + pair
    cos = tl.load(cos_ptr + angle, mask=pair < K // 2, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=pair < K // 2, other=0.0)[None, :]
    token = program.to(tl.int64)  # int64: token * 3D of a packed q, k, v passes 2^31 at 4K
    norm_rope(q_ptr + token * q_stride, weight_q_ptr, cos, sin, eps, N, K, BLOCK_N, BLOCK_K)
    norm_rope(k_ptr + token * k_stride, weight_k_ptr, cos, sin, eps, N, K, BLOCK_N, BLOCK_K)
