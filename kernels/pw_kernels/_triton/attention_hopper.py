# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.attention` for Hopper: TMA and warp specialisation.

Arithmetic and arguments are those of `attention_portable` without a bias: the compiler does not
specialise a loop that loads through pointers. It makes 12 warps out of 4: four that fetch keys and
values by TMA and twice four that own 64 queries each, so that the exponentials of one half overlap
with the products of the other. Triton does so only for a single loop over descriptors, num_warps=4
and 128 queries; tests/kernels/test_attention_compiled.py inspects the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pw_kernels._triton.attention_portable import LN2


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
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute out [S, N, K] and lse [S, N] of attention; strides are from token to token."""
    # all query tiles of a head in sequence: its keys and values stay in L2
    tiles = tl.cdiv(n_queries, BLOCK_M)
    head = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BLOCK_M
    # One descriptor per head: rows past the last token read as zeros and are not written. Made here
    # and not on the host, because the compiler halves the tiles of queries, and only a descriptor
    # made in the kernel can be halved with them.
    q_rows = tl.make_tensor_descriptor(
        q_ptr + head * K, [n_queries, K], [q_stride, 1], [BLOCK_M, K]
    )
    k_rows = tl.make_tensor_descriptor(k_ptr + head * K, [n_keys, K], [k_stride, 1], [BLOCK_N, K])
    v_rows = tl.make_tensor_descriptor(v_ptr + head * K, [n_keys, K], [v_stride, 1], [BLOCK_N, K])
    out_rows = tl.make_tensor_descriptor(
        out_ptr + head * K, [n_queries, K], [n_heads * K, 1], [BLOCK_M, K]
    )
    q = q_rows.load([first, 0])
    column = tl.arange(0, BLOCK_N)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, K], tl.float32)
    for start in tl.range(0, n_keys, BLOCK_N, warp_specialize=True):
        s = tl.dot(q, k_rows.load([start, 0]).T)
        # A key past the end reads as zeros, and its logit of 0 has to become -inf. For every tile,
        # because with a second loop or a branch the warps are not specialised.
        s = tl.where((column < n_keys - start)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        grown = tl.exp2(m - m_new)
        p_sum = tl.sum(p, 1)
        v = v_rows.load([start, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * grown[:, None])
        total = total * grown + p_sum
        m = m_new
    row = tl.arange(0, BLOCK_M)
    lse_ptr += first.to(tl.int64) * n_heads + head
    tl.store(lse_ptr + row * n_heads, (m + tl.log2(total)) * LN2, mask=row < n_queries - first)
    out_rows.store([first, 0], (acc / total[:, None]).to(out_ptr.dtype.element_ty))
