# SPDX-License-Identifier: Apache-2.0
"""Softmax attention in which every block of queries keeps some blocks of keys: an approximation.

Tokens are put in the order of space-time tiles and cut into blocks of 128. A block of queries
attends to the keys of the blocks that it keeps, and to one key for each of the others: the mean of
their keys, its logit raised by ln 128, with the mean of their values. That is exact where the keys
of a block are equal, and the first order where they are not.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.attention.sparse_variants import BLOCK, blocks_of, run, tiling_for
from pw_kernels.launcher import capability, cdiv
from pw_kernels.op import Cost, Op, register, require, select

HEAD_WIDTHS = (64, 128)  # of the Triton kernels
TILE = (1, 8, 16)  # tokens of a tile: frames, rows, columns
LEAST_KEPT = 4  # blocks: with those of the diagonal and the last one, at least two are chosen
GATHERED_BYTES = 64 * 2**20  # limit for the keys and values of one step of the reference
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
    order = tile_order(grid, q.device)
    q, k_rows, v_rows = q[order], rows_with_means(k[order]), rows_with_means(v[order])
    kept = choose_blocks(q, k_rows, keep)
    triton = select(_NAME, q.device) == "triton"
    attend = torch.ops.pw.sparse_attention if triton else reference
    out = torch.empty_like(q)
    out[order] = attend(q, k_rows, v_rows, kept)
    return out


@lru_cache(maxsize=4)
def tile_order(grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return the tokens of a grid, [S] int64, tile by tile; tiles at the far ends are smaller."""
    frames, rows, columns = (torch.arange(n) for n in grid)
    place = torch.meshgrid(frames, rows, columns, indexing="ij")
    tiles = [x // size for x, size in zip(place, TILE, strict=True)]
    counts = [cdiv(n, size) for n, size in zip(grid, TILE, strict=True)]
    tile = (tiles[0] * counts[1] + tiles[1]) * counts[2] + tiles[2]
    return tile.flatten().argsort(stable=True).to(device)


def kept_of(tokens: int, keep: float) -> int:
    """Return the number of blocks that each block of queries keeps."""
    blocks = blocks_of(tokens)
    return min(blocks, max(LEAST_KEPT, math.ceil(keep * blocks)))


def rows_with_means(x: Tensor) -> Tensor:
    """Append the mean of each block: [S, N, K] -> [R, N, K].

    Zeros fill the last block of tokens, and the last block of means, to whole blocks. The mean of
    the last block of tokens includes the zeros: that block is always kept.
    """
    blocks = blocks_of(len(x))
    rows = x.new_zeros((blocks + blocks_of(blocks)) * BLOCK, *x.shape[1:])
    rows[: len(x)] = x
    whole = rows[: blocks * BLOCK].unflatten(0, (blocks, BLOCK))
    means = whole.mean(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
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


def reference(q: Tensor, k_rows: Tensor, v_rows: Tensor, kept: Tensor) -> Tensor:
    """Oracle of the operation after blocks are chosen.

    Args:
        q: [S, N, K] queries.
        k_rows: [R, N, K] keys and their means, from `rows_with_means`.
        v_rows: [R, N, K] values and their means.
        kept: [N, B, n] int32 blocks that each block of queries keeps, the last of all among them.

    Returns:
        [S, N, K].
    """
    tokens, heads, width = q.shape
    blocks, count = kept.shape[1:]
    out = q.new_empty(heads, blocks * BLOCK, width)
    padded = F.pad(q.transpose(0, 1), (0, 0, 0, blocks * BLOCK - tokens))
    queries = padded.unflatten(1, (blocks, BLOCK))  # [N, B, 128, K]
    keys, values = (x.unflatten(0, (-1, BLOCK)).permute(2, 0, 1, 3) for x in (k_rows, v_rows))
    means = slice(blocks * BLOCK, blocks * BLOCK + blocks)
    row_bytes = 2 * (count * BLOCK + blocks) * width * q.element_size()
    step = max(1, GATHERED_BYTES // row_bytes)
    for head in range(heads):
        mean_k, mean_v = k_rows[means, head], v_rows[means, head]  # [B, K]
        for first in range(0, blocks, step):
            lists = kept[head, first : first + step].long()  # [G, n]
            group = len(lists)
            gathered = [
                torch.cat((x[head][lists].flatten(1, 2), mean.expand(group, -1, -1)), dim=1)
                for x, mean in ((keys, mean_k), (values, mean_v))
            ]  # [G, n * 128 + B, K]
            bias = q.new_zeros(group, 1, count * BLOCK + blocks)
            bias[:, :, count * BLOCK - (blocks * BLOCK - tokens) : count * BLOCK] = -math.inf
            bias[:, 0, count * BLOCK :].fill_(math.log(BLOCK)).scatter_(1, lists, -math.inf)
            out.unflatten(1, (blocks, BLOCK))[head, first : first + step] = (
                F.scaled_dot_product_attention(
                    queries[head, first : first + step][:, None],
                    gathered[0][:, None],
                    gathered[1][:, None],
                    attn_mask=bias[:, None].expand(-1, -1, BLOCK, -1),
                )[:, 0]
            )
    return out[:, :tokens].transpose(0, 1)


def cost(q: Tensor, k_rows: Tensor, v_rows: Tensor, kept: Tensor) -> Cost:
    """Count the products with all kept keys and all means; one read of q, k and v, one write."""
    blocks, count = kept.shape[1:]
    moved = (2 * q.numel() + k_rows.numel() + v_rows.numel()) * q.element_size()
    return Cost(
        flops=4 * q.numel() * (count * BLOCK + blocks),
        bytes=moved + kept.numel() * kept.element_size(),
    )


def _check_public(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], keep: float
) -> None:
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
    return reference(q, k_rows, v_rows, kept).contiguous()


@_op.register_kernel("cuda")
def run_kernel(q: Tensor, k_rows: Tensor, v_rows: Tensor, kept: Tensor) -> Tensor:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    _check_for_triton(q, k_rows, v_rows, kept)
    return run(tiling_for(capability(q.device), q.shape[2]), q, k_rows, v_rows, kept)


@_op.register_fake
def _fake(q: Tensor, k_rows: Tensor, v_rows: Tensor, kept: Tensor) -> Tensor:
    return q.new_empty(q.shape)


OP = register(Op(_NAME, reference, cost, run_kernel))
