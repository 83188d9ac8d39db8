# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.sparse_attention` for every GPU.

As `attention_portable`, but a program passes over a list of blocks of keys: those that its queries
keep, then all blocks of mean keys. Of the latter, bits say which stand in for a block that was not
kept; their logits are raised by the logarithm of the number of keys that each stands for.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_tokens", "n_heads", "n_kept"])
def kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    list_ptr,
    stands_in_ptr,
    out_ptr,
    n_tokens,
    n_heads,
    n_kept,
    q_stride,
    k_stride,
    v_stride,
    scale,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute out [S, N, K]; strides are from token to token, of k and v from row to row.

    With B blocks of tokens and M blocks of means, for each head and block of queries: list
    [n_kept + M] int32, numbers of blocks of rows; stands_in [2 M] int64, a bit for each mean.
    """
    # all blocks of queries of a head in sequence: its keys and values stay in L2
    blocks = tl.cdiv(n_tokens, BLOCK)
    mean_blocks = tl.cdiv(blocks, BLOCK)
    head = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK
    list_ptr += tl.program_id(0).to(tl.int64) * (n_kept + mean_blocks)
    stands_in_ptr += tl.program_id(0).to(tl.int64) * (mean_blocks * 2)
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, K)
    key = tl.arange(0, BLOCK_N)
    inside = row < n_tokens - first
    token = first.to(tl.int64)  # token * stride passes 2^31 at 4K
    q_ptr += token * q_stride + head * K
    q_ptrs = q_ptr + (row[:, None] * q_stride + column[None, :])
    q = tl.load(q_ptrs, mask=inside[:, None], other=0.0)
    k_ptrs = k_ptr + head * K + (key[None, :] * k_stride + column[:, None])
    v_ptrs = v_ptr + head * K + (key[:, None] * v_stride + column[None, :])
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, K], tl.float32)
    parts: tl.constexpr = BLOCK // BLOCK_N
    # One loop for kept keys and means: two loops spill registers on sm_80.
    for i in tl.range(0, (n_kept + mean_blocks) * parts):
        start = tl.load(list_ptr + i // parts) * BLOCK + i % parts * BLOCK_N
        mean = i * BLOCK_N - n_kept * BLOCK  # the first mean of the tile, or negative
        word = tl.load(stands_in_ptr + tl.maximum(mean, 0) // 64)
        bits = (word >> (start % 64 + key).to(tl.int64)) & 1
        live = tl.where(mean >= 0, bits != 0, key < n_tokens - start)
        shift = tl.where(mean >= 0, LOG2_BLOCK, 0.0)
        s = tl.dot(q, tl.load(k_ptrs + start.to(tl.int64) * k_stride))
        s = tl.where(live[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale + shift)
        p = tl.exp2(s * scale - (m_new - shift)[:, None])
        grown = tl.exp2(m - m_new)
        total = total * grown + tl.sum(p, 1)
        acc = acc * grown[:, None]
        # Values are loaded only here: earlier, they take more registers and some spill.
        v = tl.load(v_ptrs + start.to(tl.int64) * v_stride)
        acc = tl.dot(p.to(v.dtype), v, acc)
        m = m_new
    out_ptr += (token * n_heads + head) * K
    out_ptrs = out_ptr + (row[:, None] * (n_heads * K) + column[None, :])
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])
