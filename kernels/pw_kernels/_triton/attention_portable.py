# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.attention` for every GPU.

A program owns a tile of queries of one head and passes over that head's keys once, with a running
maximum m, the total of the exponentials and the weighted values acc, all fp32; total and acc are
rescaled when m grows. Logits are multiplied by log2(e), so that every exponential is an exp2.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def key_biases(bias_ptr, start, n_keys, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Return the bias of each key of a tile times log2(e); -inf past the last of n_keys."""
    key = start + tl.arange(0, BLOCK_N)
    inside = key < n_keys
    if HAS_BIAS:
        biases = tl.load(bias_ptr + key, mask=inside, other=0.0).to(tl.float32) * LOG2E
    else:
        biases = tl.zeros([BLOCK_N], tl.float32)
    return tl.where(inside, biases, float("-inf"))


@triton.jit
def add_keys(
    q,
    m,
    total,
    acc,
    k_ptr,
    v_ptr,
    bias_ptr,
    start,
    n_keys,
    k_stride,
    v_stride,
    scale,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    """Add the keys from `start` to m, total and acc; IS_LAST: with a mask and biases."""
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, K)
    # int64 for the start of the tile; 32 bits suffice within it
    k_ptr += tl.cast(start, tl.int64) * k_stride
    v_ptr += tl.cast(start, tl.int64) * v_stride
    k_ptrs = k_ptr + (row[None, :] * k_stride + column[:, None])
    v_ptrs = v_ptr + (row[:, None] * v_stride + column[None, :])
    if IS_LAST:
        inside = row < n_keys - start
        s = tl.dot(q, tl.load(k_ptrs, mask=inside[None, :], other=0.0))
        s = s * scale + key_biases(bias_ptr, start, n_keys, BLOCK_N, HAS_BIAS)[None, :]
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
    else:
        s = tl.dot(q, tl.load(k_ptrs))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
    grown = tl.exp2(m - m_new)
    total = total * grown + tl.sum(p, 1)
    acc = acc * grown[:, None]
    # Values are loaded only here: earlier, they take 50 more registers and some spill.
    v = tl.load(v_ptrs, mask=inside[:, None], other=0.0) if IS_LAST else tl.load(v_ptrs)
    return m_new, total, tl.dot(p.to(v.dtype), v, acc)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "n_heads"])
def kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    n_queries,
    n_keys,
    n_heads,
    q_stride,
    k_stride,
    v_stride,
    scale,
    bias_ptr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Compute out [S, N, K] and lse [S, N] of attention; strides are from token to token.

    bias [E] is read only if HAS_BIAS.
    """
    # all query tiles of a head in sequence: its keys and values stay in L2
    tiles = tl.cdiv(n_queries, BLOCK_M)
    head = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, K)
    inside = row < n_queries - first
    token = first.to(tl.int64)  # token * stride passes 2^31 at 4K
    q_ptr += token * q_stride + head * K
    q_ptrs = q_ptr + (row[:, None] * q_stride + column[None, :])
    q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
    k_ptr += head * K
    v_ptr += head * K
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, K], tl.float32)
    # Only the last tile needs the mask, so the first loop has none. Biases are for the text, a few
    # tiles of keys, where the mask does not matter.
    plain = 0 if HAS_BIAS else n_keys // BLOCK_N * BLOCK_N
    for start in tl.range(0, plain, BLOCK_N):
        m, total, acc = add_keys(
            q, m, total, acc, k_ptr, v_ptr, bias_ptr, start, n_keys, k_stride, v_stride, scale,
            K, BLOCK_N, HAS_BIAS, False,
        )  # fmt: skip
    for start in tl.range(plain, n_keys, BLOCK_N, num_stages=1):
        m, total, acc = add_keys(
            q, m, total, acc, k_ptr, v_ptr, bias_ptr, start, n_keys, k_stride, v_stride, scale,
            K, BLOCK_N, HAS_BIAS, True,
        )  # fmt: skip
    lse_ptr += token * n_heads + head
    tl.store(lse_ptr + row * n_heads, (m + tl.log2(total)) * LN2, mask=inside)
    out_ptr += (token * n_heads + head) * K
    out_ptrs = out_ptr + (row[:, None] * (n_heads * K) + column[None, :])
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])
