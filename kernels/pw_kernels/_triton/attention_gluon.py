# SPDX-License-Identifier: Apache-2.0
"""Gluon kernel of `pw_kernels.attention` for Hopper, scheduled by hand as in FlashAttention-3.

Arithmetic and arguments are those of `attention_hopper`; the grid has one program per
multiprocessor, or per tile of queries of each head if those are fewer. It is compiled with
num_warps=4 and has 12: one of them fetches by TMA. Two warpgroups, the consumers, own 64 queries
each; each computes the exponentials of a tile of keys while its tensor cores add the values of the
previous tile. tests/kernels/gluon_model.py runs these very functions over modelled barriers;
tests/kernels/test_attention_gluon.py inspects the machine code.
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

# Triton 3.8 has both names; 3.9 keeps the old one as a stub that raises when compiled.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
LN2 = attention_portable.LN2
ROWS = gl.constexpr(64)  # queries of a consumer
CONSUMERS = gl.constexpr(2)

# A ring is (tiles, full, empty): slots of shared memory, each with a barrier that filling it
# completes and a barrier that the consumers' last use completes. The n-th tile of a ring of s slots
# is in slot n % s; the parity to wait for flips with every round.


@gluon.jit
def make_ring(
    dtype: gl.constexpr,
    slots: gl.constexpr,
    rows: gl.constexpr,
    K: gl.constexpr,
    readers: gl.constexpr,
):
    """Make an empty ring of tiles [rows, K], each read by a number of consumers."""
    tiles = gl.allocate_shared_memory(dtype, [slots, rows, K], gl.NVMMASharedLayout(128, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(slots):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=readers)
    return tiles, full, empty


@gluon.jit
def fetch(ring, n, rows, row, column):
    """Fill the slot of tile n once it is empty, as all slots of a new ring are."""
    tiles, full, empty = ring
    slots: gl.constexpr = tiles.shape[0]
    slot = n % slots
    mbarrier.wait(empty.index(slot), (n // slots & 1) ^ 1)
    mbarrier.expect(full.index(slot), rows.block_type.nbytes)
    load_tile(rows, [row, column], full.index(slot), tiles.index(slot))


@gluon.jit
def wait_for(ring, n):
    """Return when tile n has arrived."""
    tiles, full, _empty = ring
    slots: gl.constexpr = tiles.shape[0]
    mbarrier.wait(full.index(n % slots), n // slots & 1)


@gluon.jit
def tile(ring, n):
    """Return tile n in shared memory."""
    tiles, _full, _empty = ring
    return tiles.index(n % tiles.shape[0])


@gluon.jit
def release(ring, n):
    """Release tile n for this consumer, whose products with it are complete."""
    tiles, _full, empty = ring
    mbarrier.arrive(empty.index(n % tiles.shape[0]))


@gluon.jit
def produce(
    pointers,
    strides,
    counts,
    rings,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Fetch what this program's consumers read, in their order."""
    q_ptr, k_ptr, v_ptr = pointers
    q_stride, k_stride, v_stride = strides
    n_queries, n_keys, n_heads = counts
    q_ring, k_ring, v_ring = rings
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    # One descriptor for all heads, which are adjacent in a token's row; rows past the last read as
    # zeros. Made here, because the warp that uses a descriptor has to make it visible to its TMA
    # unit.
    width = n_heads * K
    q_rows = tma.make_tensor_descriptor(q_ptr, [n_queries, width], [q_stride, 1], [ROWS, K], layout)
    k_rows = tma.make_tensor_descriptor(k_ptr, [n_keys, width], [k_stride, 1], [BLOCK_N, K], layout)
    v_rows = tma.make_tensor_descriptor(v_ptr, [n_keys, width], [v_stride, 1], [BLOCK_N, K], layout)
    query_tiles = gl.cdiv(n_queries, BLOCK_M)
    key_tiles = gl.cdiv(n_keys, BLOCK_N)
    n = 0  # tiles of keys so far
    n_q = 0  # tiles of queries so far, CONSUMERS at a time
    for work in range(gl.program_id(0), query_tiles * n_heads, gl.num_programs(0)):
        column = work // query_tiles * K
        first = work % query_tiles * BLOCK_M
        for consumer in gl.static_range(CONSUMERS):
            fetch(q_ring, n_q + consumer, q_rows, first + consumer * ROWS, column)
        n_q += CONSUMERS
        for i in range(key_tiles):
            start = (key_tiles - 1 - i) * BLOCK_N
            fetch(k_ring, n, k_rows, start, column)
            fetch(v_ring, n, v_rows, start, column)
            n += 1


@gluon.jit
def start_logits(q, k_ring, n, BLOCK_N: gl.constexpr):
    """Start the product of the queries with the keys of tile n."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    blank = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    wait_for(k_ring, n)
    return warpgroup_mma(q, tile(k_ring, n).permute((1, 0)), blank, use_acc=False, is_async=True)


@gluon.jit
def weigh(
    s,
    m,
    start,
    n_keys,
    scale,
    BLOCK_N: gl.constexpr,
    IS_LAST: gl.constexpr,
):
    """Return exp2(logits - running maximum) and the maximum; IS_LAST: mask keys past the end."""
    if IS_LAST:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
        inside = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout)) < n_keys
        s = gl.where(inside[None, :], s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    return gl.exp2(s * scale - m_new[:, None]), m_new


@gluon.jit
def consume(
    consumer: gl.constexpr,
    pointers,
    counts,
    scale,
    rings,
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Compute attention of this consumer's queries in each of the program's tiles.

    Keys are read from last to first, so that only the tile before the loop needs a mask.
    """
    out_ptr, lse_ptr = pointers
    n_queries, n_keys, n_heads = counts
    q_ring, k_ring, v_ring = rings
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, acc_layout)
    query_tiles = gl.cdiv(n_queries, BLOCK_M)
    key_tiles = gl.cdiv(n_keys, BLOCK_N)
    last = (key_tiles - 1) * BLOCK_N
    n = 0
    n_q = consumer
    for work in range(gl.program_id(0), query_tiles * n_heads, gl.num_programs(0)):
        wait_for(q_ring, n_q)
        q = tile(q_ring, n_q)
        s = warpgroup_mma_wait(0, deps=[start_logits(q, k_ring, n, BLOCK_N)])
        release(k_ring, n)
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        weights, m = weigh(s, m, last, n_keys, scale, BLOCK_N, True)
        total = gl.sum(weights, 1)
        p = gl.convert_layout(weights.to(q.dtype), p_layout)
        acc = gl.zeros([ROWS, K], gl.float32, acc_layout)
        wait_for(v_ring, n)
        for i in range(1, key_tiles):
            n += 1
            started = start_logits(q, k_ring, n, BLOCK_N)
            acc = warpgroup_mma(p, tile(v_ring, n - 1), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[started])
            release(k_ring, n)
            weights, m_new = weigh(s, m, last - i * BLOCK_N, n_keys, scale, BLOCK_N, False)
            grown = gl.exp2(m - m_new)
            total = total * grown + gl.sum(weights, 1)
            m = m_new
            # Waiting for the next values here, not where they are used, splits the machine code
            # into two blocks. In a single one ptxas moves the wait for acc before all exponentials.
            wait_for(v_ring, n)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            release(v_ring, n - 1)
            acc = acc * gl.convert_layout(grown, by_row)[:, None]
            p = gl.convert_layout(weights.to(q.dtype), p_layout)
        release(q_ring, n_q)
        acc = warpgroup_mma(p, tile(v_ring, n), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        release(v_ring, n)
        n += 1
        n_q += CONSUMERS
        m = gl.convert_layout(m, by_row)
        total = gl.convert_layout(total, by_row)
        first = work % query_tiles * BLOCK_M + consumer * ROWS
        rows = first + gl.arange(0, ROWS, by_row)
        inside = rows < n_queries
        places = rows.to(gl.int64) * n_heads + work // query_tiles
        gl.store(lse_ptr + places, (m + gl.log2(total)) * LN2, mask=inside)
        column = gl.arange(0, K, gl.SliceLayout(0, acc_layout))
        out_ptrs = out_ptr + (places * K)[:, None] + column[None, :]
        gl.store(out_ptrs, (acc / total[:, None]).to(q.dtype), mask=inside[:, None])


@gluon.jit(do_not_specialize=["n_queries", "n_keys", "n_heads"])
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
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Compute out [S, N, K] and lse [S, N] of attention; strides are from token to token."""
    gl.static_assert(BLOCK_M == ROWS * CONSUMERS)
    # a consumer waits for the next values before it releases the current ones
    gl.static_assert(STAGES >= 2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    rings = (
        make_ring(dtype, CONSUMERS, ROWS, K, 1),
        make_ring(dtype, STAGES, BLOCK_N, K, CONSUMERS),
        make_ring(dtype, STAGES, BLOCK_N, K, CONSUMERS),
    )
    inputs = (q_ptr, k_ptr, v_ptr)
    others = (out_ptr, lse_ptr)
    strides = (q_stride, k_stride, v_stride)
    counts = (n_queries, n_keys, n_heads)
    gl.warp_specialize(
        [
            (consume, (0, others, counts, scale, rings, K, BLOCK_M, BLOCK_N)),
            (consume, (1, others, counts, scale, rings, K, BLOCK_M, BLOCK_N)),
            (produce, (inputs, strides, counts, rings, K, BLOCK_M, BLOCK_N)),
        ],
        [4, 1],  # warps; the first partition has the kernel's
        [240, 24],  # registers; the first partition has what is left of 3 * 168, 240
    )
