# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.qk_norm_rope`: one program per token, queries and keys at once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotated_norm(
    x_ptr,
    gain_ptr,
    out_ptr,
    cos,
    sin,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = rope(rms_norm(x)) of one token, D channels; cos and sin [BLOCK/2]."""
    column = tl.arange(0, BLOCK)
    inside = column < D
    stored = tl.load(x_ptr + column, mask=inside, other=0.0)
    dtype = stored.dtype
    x = stored.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded before and after the gain, as WanRMSNorm does.
    normed = (normed.to(dtype).to(tl.float32) * gain).to(dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(normed, (BLOCK // 2, 2)))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    tl.store(out_ptr + column, tl.reshape(pairs, (BLOCK,)).to(dtype), mask=inside)


@triton.jit
def kernel(
    q_ptr,
    k_ptr,
    gain_q_ptr,
    gain_k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_stride,
    k_stride,
    eps,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Both outputs of one token; PAIRS rotated channel pairs make one head."""
    token = tl.program_id(0).to(tl.int64)  # int64: token * 3D of a packed q, k, v passes 2^31 at 4K
    pair = tl.arange(0, BLOCK // 2)
    angle = token * PAIRS + pair % PAIRS  # every head turns by the same angles
    cos = tl.load(cos_ptr + angle, mask=pair < D // 2, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=pair < D // 2, other=0.0)
    out = token * D
    q, k = q_ptr + token * q_stride, k_ptr + token * k_stride
    rotated_norm(q, gain_q_ptr, q_out_ptr + out, cos, sin, eps, D, BLOCK)
    rotated_norm(k, gain_k_ptr, k_out_ptr + out, cos, sin, eps, D, BLOCK)
