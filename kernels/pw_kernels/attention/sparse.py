# SPDX-License-Identifier: Apache-2.0
"""Softmax attention in which every block of queries keeps some blocks of keys: an approximation.

Tokens are put in the order of space-time tiles and cut into blocks of 128. A block of queries
attends to the keys of the blocks that it keeps, and to one key for each of the others: the mean of
their keys, its logit raised by ln 128, with the mean of their values. That is exact where the keys
of a block are equal, and the first order where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.attention.sparse_variants import BLOCK, blocks_of, run, tiling_for
from pw_kernels.launcher import capability
from pw_kernels.op import Cost, Op, register, require, select

HEAD_WIDTHS = (64, 128)  # of the Triton kernels
# Tiles of tokens, as (frames, rows, columns), whose order a head may have: lines of whole rows, and
# 128 tokens that are near each other.
TILES = ((1, 1, 1024), (2, 8, 8))
LEAST_KEPT = 4  # blocks: with those of the diagonal and the last one, at least two are chosen
GATHERED_BYTES = 32 * 2**20  # limit for the keys and values that the reference takes at a time
_NAME = "sparse_attention"


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], keep: float
) -> Tensor:
    """Approximate softmax(q kT / sqrt(K)) v, keeping a fraction of the blocks of keys.

    With as few tokens as LEAST_KEPT blocks have, nothing is dropped.

    Args:
        q: [S, N, K] queries of all tokens, frame by frame, row by row.
        k: [S, N, K] keys.
        v: [S, N, K] values.
        grid: tokens as (frames, rows, columns); their product is S.
        keep: fraction of the blocks that each block of queries keeps, above 0 and at most 1.

    Returns:
        [S, N, K] in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, a fraction out of range; input
            that a Triton kernel does not take, where one was requested.
    """
    _check_public(q, k, v, grid, keep)
    triton = select(_NAME, q.device) == "triton"
    return _by_blocks(torch.ops.pw.sparse_attention if triton else attend, q, k, v, grid, keep)


def reference(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], keep: float) -> Tensor:
    """Oracle of `sparse_attention`, for every head width and dtype."""
    return _by_blocks(attend, q, k, v, grid, keep)


def _by_blocks(
    run_attention: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int, int],
    keep: float,
) -> Tensor:
    order = choose_orders(k, grid), torch.arange(q.shape[1], device=q.device)  # [S, N], [N]
    q, k_rows, v_rows = q[order], rows_with_means(k[order]), rows_with_means(v[order])
    ordered = run_attention(q, k_rows, v_rows, choose_blocks(q, k_rows, keep))
    del k_rows, v_rows  # before the result is allocated
    out = torch.empty_like(q)
    out[order] = ordered
    return out


@lru_cache(maxsize=4)
def orders_of(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return the tokens of a grid in the orders of TILES, [O, S] int64, tile by tile.

    Tiles at the far ends are smaller, so that blocks of 128 need not be tiles.
    """
    axes = (torch.arange(n) for n in grid)
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # [S, 3]
    orders = []
    for tile in TILES:
        size = torch.tensor(tile)
        counts = -(-torch.tensor(grid) // size)
        t, h, w = (place // size).unbind(-1)
        orders.append(((t * counts[1] + h) * counts[2] + w).argsort(stable=True))
    return torch.stack(orders).to(device)


def choose_orders(k: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Choose the order of tokens for each head: that in which keys vary least within blocks.

    Their variance is fixed, so it is the order in which the means of blocks vary most.

    Returns:
        [S, N] int64, contiguous.
    """
    orders = orders_of(grid, k.device)
    blocks = len(k) // BLOCK  # whole ones
    if blocks == 0:
        return orders[:1].T.expand(-1, k.shape[1]).contiguous()
    spread = []
    for order in orders:
        means = k[order[: blocks * BLOCK]].unflatten(0, (blocks, BLOCK)).mean(1, dtype=_wide(k))
        spread.append(means.square().sum((0, 2)))
    return orders[torch.stack(spread).nan_to_num_().argmax(0)].T.contiguous()


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype of means."""
    return torch.promote_types(x.dtype, torch.float32)


def kept_of(tokens: int, keep: float) -> int:
    """Return the number of blocks that each block of queries keeps."""
    blocks = blocks_of(tokens)
    return min(blocks, max(LEAST_KEPT, math.ceil(keep * blocks)))


def kept_keys(tokens: int, keep: float) -> int:
    """Return the number of keys that a query attends to, means among them."""
    return min(tokens, kept_of(tokens, keep) * BLOCK) + blocks_of(tokens)


def rows_with_means(x: Tensor) -> Tensor:
    """Append the mean of each block: [S, N, K] -> [R, N, K].

    Zeros fill the last block of tokens, and the last block of means, to whole blocks. The mean of
    the last block of tokens includes the zeros: that block is always kept.
    """
    blocks = blocks_of(len(x))
    rows = x.new_zeros((blocks + blocks_of(blocks)) * BLOCK, *x.shape[1:])
    rows[: len(x)] = x
    whole = rows[: blocks * BLOCK].unflatten(0, (blocks, BLOCK))
    means = whole.mean(dim=1, dtype=_wide(x))
    rows[blocks * BLOCK : blocks * BLOCK + blocks] = means
    return rows


def choose_blocks(q: Tensor, k_rows: Tensor, keep: float) -> Tensor:
    """Choose the blocks of keys for each block of queries by the products of their means.

    The block of the queries themselves and the last block, which may be smaller, are always kept.

    Args:
        q: [S, N, K] queries in tile order.
        k_rows: [R, N, K] from `rows_with_means`.
        keep: fraction.

    Returns:
        [N, B, kept] int32, ascending along the last axis.
    """
    blocks = blocks_of(len(q))
    first = blocks * BLOCK
    mean_q = rows_with_means(q)[first : first + blocks].transpose(0, 1).float()  # [N, B, K]
    mean_k = k_rows[first : first + blocks].permute(1, 2, 0).float()  # [N, K, B]
    # NaN would come first and take the place of the blocks that are always kept
    scores = (mean_q @ mean_k).nan_to_num_(nan=-math.inf)  # [N, B, B]
    scores.diagonal(dim1=1, dim2=2).fill_(math.inf)
    scores[:, :, -1] = math.inf
    kept = scores.topk(kept_of(len(q), keep), dim=-1, sorted=False).indices
    return kept.sort(dim=-1).values.int()


def attend(q: Tensor, k_rows: Tensor, v_rows: Tensor, kept: Tensor) -> Tensor:
    """Attend to the kept blocks, and to the means of the others: the oracle of the kernels.

    Args:
        q: [S, N, K] queries.
        k_rows: [R, N, K] keys and their means, from `rows_with_means`.
        v_rows: [R, N, K] values and their means.
        kept: [N, B, n] int32 blocks that each block of queries keeps, the last of all among them.

    Returns:
        [S, N, K].
    """
    tokens, heads = q.shape[:2]
    blocks, count = kept.shape[1:]
    # queries, whose place the results take: [N, B, 128, K]
    out = F.pad(q.transpose(0, 1), (0, 0, 0, blocks * BLOCK - tokens))
    out = out.unflatten(1, (blocks, BLOCK))
    gathered_bytes = 2 * (count + blocks_of(blocks)) * k_rows[:BLOCK, 0].nbytes
    step = max(1, GATHERED_BYTES // gathered_bytes)
    for head in range(heads):
        _attend_head(out[head], k_rows[:, head], v_rows[:, head], kept[head], tokens, step)
    return out.flatten(1, 2)[:, :tokens].transpose(0, 1)


def _attend_head(
    q: Tensor, k_rows: Tensor, v_rows: Tensor, kept: Tensor, tokens: int, step: int
) -> None:
    """Replace the queries of one head, [B, 128, K], by the results, `step` blocks at a time."""
    keys, values = (x.contiguous().unflatten(0, (-1, BLOCK)) for x in (k_rows, v_rows))
    blocks = len(q)
    means = torch.arange(blocks, len(keys), device=q.device)
    for group, some in zip(q.split(step), kept.split(step), strict=True):
        lists = torch.cat((some.long(), means.expand(len(some), -1)), dim=1)  # [G, n + M]
        bias = q.new_zeros(len(some), lists.shape[1] * BLOCK)
        of_keys, of_means = bias.split((some.shape[1] * BLOCK, len(means) * BLOCK), dim=1)
        of_keys[:, of_keys.shape[1] - (blocks * BLOCK - tokens) :] = -math.inf
        of_means[:, :blocks] = math.log(BLOCK)
        of_means[:, blocks:] = -math.inf
        of_means.scatter_(1, some.long(), -math.inf)
        group[:, None] = F.scaled_dot_product_attention(
            group[:, None],  # [G, 1, 128, K]
            keys[lists].flatten(1, 2)[:, None],  # [G, 1, E, K]
            values[lists].flatten(1, 2)[:, None],
            attn_mask=bias[:, None, None].expand(-1, -1, BLOCK, -1),
        )


def cost(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], keep: float) -> Cost:
    """Count the products with all kept keys and all means; one read of q, k and v, one write."""
    flops = 4 * q.numel() * kept_keys(len(q), keep)
    return Cost(flops=flops, bytes=4 * q.numel() * q.element_size())


def sparse_bytes(tokens: int, heads: int, width: int, itemsize: int, keep: float) -> int:
    """Return the bytes that a call takes at its peak, beside its input and with its result.

    Queries, keys and values in blocks and the result; beside them lists of blocks while these are
    chosen, then what the reference takes at a time.
    """
    blocks, kept = blocks_of(tokens), kept_of(tokens, keep)
    rows = (blocks + blocks_of(blocks)) * BLOCK
    ordered = (2 * rows + tokens + blocks * BLOCK) * heads * width * itemsize
    lists = heads * blocks * (4 * blocks + 24 * kept)
    one = 2 * (kept + blocks_of(blocks)) * BLOCK * width * itemsize
    taken = min(blocks, max(1, GATHERED_BYTES // one)) * one + 2 * rows * width * itemsize
    return ordered + 8 * heads * tokens + max(lists, taken)


def _check_public(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], keep: float) -> None:
    require(q.dim() == 3, _NAME, "q [S, N, K]", tuple(q.shape))
    require(q.shape[0] > 0, _NAME, "at least one token", tuple(q.shape))
    require(math.prod(grid) == len(q), _NAME, f"a grid of {len(q)} tokens", grid)
    require(0 < keep <= 1, _NAME, "a fraction above 0 and at most 1", keep)
    for x in (k, v):
        require(x.shape == q.shape, _NAME, f"k and v of q's shape {tuple(q.shape)}", tuple(x.shape))
        require(x.dtype == q.dtype, _NAME, f"all tensors of one dtype, {q.dtype}", x.dtype)
        require(x.device == q.device, _NAME, f"all tensors on {q.device}", x.device)


def _check_for_triton(q: Tensor, k_rows: Tensor, v_rows: Tensor, kept: Tensor) -> None:
    """Raise ValueError for input that the Triton kernels do not take."""
    tokens, heads, width = q.shape
    require(width in HEAD_WIDTHS, _NAME, "head width 64 or 128", width)
    require(q.dtype in (torch.bfloat16, torch.float16), _NAME, "bf16 or fp16", q.dtype)
    blocks = blocks_of(tokens)
    rows = ((blocks + blocks_of(blocks)) * BLOCK, heads, width)
    for x in (k_rows, v_rows):
        require(tuple(x.shape) == rows, _NAME, f"keys and values {rows}", tuple(x.shape))
        require(x.dtype == q.dtype, _NAME, f"all tensors of one dtype, {q.dtype}", x.dtype)
    lists = kept.dim() == 3 and kept.shape[:2] == (heads, blocks) and 0 < kept.shape[2] <= blocks
    require(lists, _NAME, f"lists of blocks [{heads}, {blocks}, n]", tuple(kept.shape))
    require(kept.dtype == torch.int32, _NAME, "int32 lists", kept.dtype)
    for x in (q, k_rows, v_rows, kept):
        require(x.is_contiguous(), _NAME, "contiguous tensors", x.stride())
        require(x.device == q.device, _NAME, f"all tensors on {q.device}", x.device)


@torch.library.custom_op("pw::sparse_attention", mutates_args=())
def _op(q: Tensor, k_rows: Tensor, v_rows: Tensor, kept: Tensor) -> Tensor:
    return attend(q, k_rows, v_rows, kept).contiguous()


@_op.register_kernel("cuda")
def run_kernel(q: Tensor, k_rows: Tensor, v_rows: Tensor, kept: Tensor) -> Tensor:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    _check_for_triton(q, k_rows, v_rows, kept)
    return run(tiling_for(capability(q.device), q.shape[2]), q, k_rows, v_rows, kept)


@_op.register_fake
def _fake(q: Tensor, k_rows: Tensor, v_rows: Tensor, kept: Tensor) -> Tensor:
    return q.new_empty(q.shape)


OP = register(Op(_NAME, reference, cost, run_kernel))
