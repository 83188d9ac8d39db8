# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.sparse_attention` for Hopper: TMA and warp specialisation.

Arithmetic and arguments are those of `sparse_attention_portable`. As in `attention_hopper`, the
compiler specialises only a single loop over descriptors, with num_warps=4 and 128 queries. Such a
loop may load numbers, but no further tensor: the means therefore follow the keys in one tensor, and
the bits that say which of them count are two words of a tile.
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
):
    """Compute out [S, N, K]; see `sparse_attention_portable`."""
    # all blocks of queries of a head in sequence: its keys and values stay in L2
    blocks = tl.cdiv(n_tokens, BLOCK)
    mean_blocks = tl.cdiv(blocks, BLOCK)
    rows = (blocks + mean_blocks) * BLOCK
    head = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK
    list_ptr += tl.program_id(0).to(tl.int64) * (n_kept + mean_blocks)
    stands_in_ptr += tl.program_id(0).to(tl.int64) * (mean_blocks * 2)
    # one descriptor per head: queries past the last token read as zeros and are not written
    q_rows = tl.make_tensor_descriptor(q_ptr + head * K, [n_tokens, K], [q_stride, 1], [BLOCK, K])
    k_rows = tl.make_tensor_descriptor(k_ptr + head * K, [rows, K], [k_stride, 1], [BLOCK, K])
    v_rows = tl.make_tensor_descriptor(v_ptr + head * K, [rows, K], [v_stride, 1], [BLOCK, K])
    out_rows = tl.make_tensor_descriptor(
        out_ptr + head * K, [n_tokens, K], [n_heads * K, 1], [BLOCK, K]
    )
    q = q_rows.load([first, 0])
    key = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, K], tl.float32)
    for i in tl.range(0, n_kept + mean_blocks, warp_specialize=True):
        start = tl.load(list_ptr + i) * BLOCK
        s = tl.dot(q, k_rows.load([start, 0]).T)
        words = stands_in_ptr + tl.maximum(i - n_kept, 0) * 2
        word = tl.where(key < 64, tl.load(words), tl.load(words + 1))
        bits = (word >> (key % 64).to(tl.int64)) & 1
        live = tl.where(i >= n_kept, bits != 0, key < n_tokens - start)
        shift = tl.where(i >= n_kept, LOG2_BLOCK, 0.0)
        s = tl.where(live[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale + shift)
        p = tl.exp2(s * scale - (m_new - shift)[:, None])
        grown = tl.exp2(m - m_new)
        p_sum = tl.sum(p, 1)
        v = v_rows.load([start, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * grown[:, None])
        total = total * grown + p_sum
        m = m_new
    out_rows.store([first, 0], (acc / total[:, None]).to(out_ptr.dtype.element_ty))
