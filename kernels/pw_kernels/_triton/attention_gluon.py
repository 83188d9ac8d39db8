# SPDX-License-Identifier: Apache-2.0
"""Gluon kernel of `pw_kernels.attention` for Hopper, scheduled by hand as FlashAttention-3 is.

Arithmetic and arguments are those of `attention_portable`; the grid is one program for each SM.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pw_kernels._triton import attention_portable

LN2 = attention_portable.LN2
ROWS = gl.constexpr(64)  # queries of a warpgroup
key_biases = gluon.jit(attention_portable.key_biases.fn)


@gluon.jit
def phase_of(n, STAGES: gl.constexpr):
    """Parity of the n-th filling of a ring of STAGES slots: it changes each time round."""
    return n // STAGES & 1


@gluon.jit
def fetch(rows, row, column, full, empty, tiles, slot, phase):
    """Fill a slot once the consumers have emptied it."""
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), rows.block_type.nbytes)
    tma.async_copy_global_to_shared(rows, [row, column], full.index(slot), tiles.index(slot))


@gluon.jit
def produce(
    pointers,
    counts,
    strides,
    tiles,
    barriers,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fetch the queries, keys and values of this program's tiles in the order of their use."""
    q_ptr, k_ptr, v_ptr = pointers
    n_queries, n_keys, n_heads = counts
    q_stride, k_stride, v_stride = strides
    q_tiles, k_tiles, v_tiles = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    width = n_heads * K
    layout: gl.constexpr = k_tiles.type.layout
    q_rows = tma.make_tensor_descriptor(
        q_ptr, [n_queries, width], [q_stride, 1], [ROWS, K], layout
    )
    k_rows = tma.make_tensor_descriptor(k_ptr, [n_keys, width], [k_stride, 1], [BLOCK_N, K], layout)
    v_rows = tma.make_tensor_descriptor(v_ptr, [n_keys, width], [v_stride, 1], [BLOCK_N, K], layout)
    query_tiles = gl.cdiv(n_queries, BLOCK_M)
    key_tiles = gl.cdiv(n_keys, BLOCK_N)
    n = 0
    q_phase = 0
    for tile in range(gl.program_id(0), query_tiles * n_heads, gl.num_programs(0)):
        first = tile % query_tiles * BLOCK_M
        column = tile // query_tiles * K
        for group in gl.static_range(2):
            fetch(q_rows, first + group * ROWS, column, q_full, q_empty, q_tiles, group, q_phase)
        q_phase ^= 1
        for i in range(key_tiles):
            start = (key_tiles - 1 - i) * BLOCK_N
            slot = n % STAGES
            phase = phase_of(n, STAGES)
            fetch(k_rows, start, column, k_full, k_empty, k_tiles, slot, phase)
            fetch(v_rows, start, column, v_full, v_empty, v_tiles, slot, phase)
            n += 1


@gluon.jit
def issue_logits(q, n, k_tiles, k_full, STAGES: gl.constexpr, BLOCK_N: gl.constexpr):
    """Start the product of the queries with the n-th tile of keys."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    slot = n % STAGES
    mbarrier.wait(k_full.index(slot), phase_of(n, STAGES))
    blank = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    k = k_tiles.index(slot).permute((1, 0))
    return warpgroup_mma(q, k, blank, use_acc=False, is_async=True)


@gluon.jit
def issue_values(p, acc, n, v_tiles, v_full, STAGES: gl.constexpr):
    """Start adding the n-th tile of values, weighed by p, to acc."""
    slot = n % STAGES
    mbarrier.wait(v_full.index(slot), phase_of(n, STAGES))
    return warpgroup_mma(p, v_tiles.index(slot), acc, is_async=True)


@gluon.jit
def weigh(s, m, n_left, scale, biases, N_BIASES: gl.constexpr, IS_LAST: gl.constexpr):
    """exp2 of the logits less their running maximum, and that maximum."""
    if IS_LAST:
        column = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        b0, b1, b2, b3 = biases
        added = key_biases(n_left, column, b0, b1, b2, b3, N_BIASES)
        s = s * scale + added[None, :]
        m_new = gl.maximum(m, gl.max(s, 1))
        p = gl.exp2(s - m_new[:, None])
    else:
        m_new = gl.maximum(m, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - m_new[:, None])
    return p, m_new


@gluon.jit
def add_keys(
    q,
    p,
    m,
    total,
    acc,
    n,
    n_left,
    scale,
    biases,
    kv_tiles,
    barriers,
    N_BIASES: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    IS_LAST: gl.constexpr,
):
    """Weigh the n-th tile of keys while the values of the tile before it are added to acc."""
    k_tiles, v_tiles = kv_tiles
    k_full, k_empty, v_full, v_empty = barriers
    s = issue_logits(q, n, k_tiles, k_full, STAGES, BLOCK_N)
    acc = issue_values(p, acc, n - 1, v_tiles, v_full, STAGES)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(n % STAGES))
    w, m_new = weigh(s, m, n_left, scale, biases, N_BIASES, IS_LAST)
    grown = gl.exp2(m - m_new)
    total = total * grown + gl.sum(w, 1)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index((n - 1) % STAGES))
    by_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    acc = acc * gl.convert_layout(grown, by_row)[:, None]
    p = gl.convert_layout(w.to(p.dtype), p.type.layout)
    return p, m_new, total, acc


@gluon.jit
def consume(
    group: gl.constexpr,
    pointers,
    counts,
    scale,
    biases,
    tiles,
    barriers,
    K: gl.constexpr,
    N_BIASES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attention of one half of the queries of each of this program's tiles."""
    out_ptr, lse_ptr = pointers
    n_queries, n_keys, n_heads = counts
    q_tiles, k_tiles, v_tiles = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, acc_layout)
    row = gl.arange(0, ROWS, by_row)
    column = gl.arange(0, K, gl.SliceLayout(0, acc_layout))
    q = q_tiles.index(group)
    query_tiles = gl.cdiv(n_queries, BLOCK_M)
    key_tiles = gl.cdiv(n_keys, BLOCK_N)
    plain = (n_keys - N_BIASES) // BLOCK_N
    n = 0
    q_phase = 0
    for tile in range(gl.program_id(0), query_tiles * n_heads, gl.num_programs(0)):
        head = tile // query_tiles
        first = tile % query_tiles * BLOCK_M + group * ROWS
        mbarrier.wait(q_full.index(group), q_phase)
        q_phase ^= 1
        s = issue_logits(q, n, k_tiles, k_full, STAGES, BLOCK_N)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(n % STAGES))
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s.type.layout))
        left = n_keys - (key_tiles - 1) * BLOCK_N
        w, m = weigh(s, m, left, scale, biases, N_BIASES, True)
        total = gl.sum(w, 1)
        p = gl.convert_layout(w.to(q.dtype), p_layout)
        acc = gl.zeros([ROWS, K], gl.float32, acc_layout)
        n += 1
        if N_BIASES > 1:
            for i in range(1, key_tiles - plain):
                p, m, total, acc = add_keys(
                    q, p, m, total, acc, n, left + i * BLOCK_N, scale, biases,
                    (k_tiles, v_tiles), (k_full, k_empty, v_full, v_empty),
                    N_BIASES, BLOCK_N, STAGES, True,
                )  # fmt: skip
                n += 1
            n_plain = gl.minimum(plain, key_tiles - 1)
        else:
            n_plain = key_tiles - 1
        for i in range(n_plain):
            p, m, total, acc = add_keys(
                q, p, m, total, acc, n, 0, scale, biases,
                (k_tiles, v_tiles), (k_full, k_empty, v_full, v_empty),
                N_BIASES, BLOCK_N, STAGES, False,
            )  # fmt: skip
            n += 1
        mbarrier.arrive(q_empty.index(group))
        acc = issue_values(p, acc, n - 1, v_tiles, v_full, STAGES)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index((n - 1) % STAGES))
        m = gl.convert_layout(m, by_row)
        total = gl.convert_layout(total, by_row)
        inside = row < n_queries - first
        offset = first.to(gl.int64) * n_heads + head
        gl.store(lse_ptr + offset + row * n_heads, (m + gl.log2(total)) * LN2, mask=inside)
        out_ptrs = out_ptr + offset * K + (row[:, None] * (n_heads * K) + column[None, :])
        gl.store(out_ptrs, (acc / total[:, None]).to(q.dtype), mask=inside[:, None])


@gluon.jit
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
    b0,
    b1,
    b2,
    b3,
    K: gl.constexpr,
    N_BIASES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out [S, N, K] and lse [S, N] of attention; strides are those from token to token."""
    gl.static_assert(BLOCK_M == 2 * ROWS)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, K], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, K], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, K], layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(q_full.index(group), count=1)
        mbarrier.init(q_empty.index(group), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=2)
    counts = (n_queries, n_keys, n_heads)
    biases = (b0, b1, b2, b3)
    tiles = (q_tiles, k_tiles, v_tiles)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    results = (out_ptr, lse_ptr)
    gl.warp_specialize(
        [
            (consume, (gl.constexpr(0), results, counts, scale, biases, tiles, barriers, K, N_BIASES, BLOCK_M, BLOCK_N, STAGES)),
            (consume, (gl.constexpr(1), results, counts, scale, biases, tiles, barriers, K, N_BIASES, BLOCK_M, BLOCK_N, STAGES)),
            (produce, ((q_ptr, k_ptr, v_ptr), counts, (q_stride, k_stride, v_stride), tiles, barriers, K, BLOCK_M, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
