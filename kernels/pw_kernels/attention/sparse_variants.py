# SPDX-License-Identifier: Apache-2.0
"""Choose and launch the kernel of `pw_kernels.sparse_attention` for a GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pw_kernels.attention.variants import LOG2E, SMALL_CAPABILITIES
from pw_kernels.launcher import cdiv, launch
from pw_kernels.variant import Argument, Kernel

BLOCK = 128  # queries and keys of a block


class Tiling(NamedTuple):
    """A kernel, the keys that one program works on at a time, and its warps."""

    kernel: Kernel
    keys: int
    num_warps: int
    num_stages: int


_WORD = 64  # bits
_COUNTS = frozenset({"n_tokens", "n_heads", "n_kept"})
_PORTABLE = Kernel("sparse_attention_portable", _COUNTS)
_HOPPER = Kernel("sparse_attention_hopper", _COUNTS)

# Head width -> tiling, as in `attention.variants`.
LARGE = {64: Tiling(_PORTABLE, 64, 8, 3), 128: Tiling(_PORTABLE, 64, 8, 2)}
SMALL = {64: Tiling(_PORTABLE, 64, 8, 3), 128: Tiling(_PORTABLE, 32, 8, 2)}
HOPPER = {64: Tiling(_HOPPER, BLOCK, 4, 2), 128: Tiling(_HOPPER, BLOCK, 4, 2)}


def blocks_of(tokens: int) -> int:
    """Return the number of blocks of tokens; the last one may be smaller."""
    return cdiv(tokens, BLOCK)


def tiling_for(gpu: tuple[int, int], width: int) -> Tiling:
    """Return the kernel and tiling for a GPU of this compute capability and heads of this width."""
    if gpu[0] == 9:
        return HOPPER[width]
    return (SMALL if gpu in SMALL_CAPABILITIES else LARGE)[width]


def run(tiling: Tiling, q: Tensor, k_rows: Tensor, v_rows: Tensor, kept: Tensor) -> Tensor:
    """Launch a kernel; return out [S, N, K]."""
    tokens, heads, width = q.shape
    blocks, count = kept.shape[1:]
    means = torch.arange(blocks, blocks + blocks_of(blocks), dtype=torch.int32, device=q.device)
    out = torch.empty_like(q)
    arguments: dict[str, Argument] = {
        "q_ptr": q,
        "k_ptr": k_rows,
        "v_ptr": v_rows,
        "list_ptr": torch.cat((kept, means.expand(heads, blocks, -1)), dim=2),
        "stands_in_ptr": stand_ins(kept),
        "out_ptr": out,
        "n_tokens": tokens,
        "n_heads": heads,
        "n_kept": count,
        "q_stride": heads * width,
        "k_stride": heads * width,
        "v_stride": heads * width,
        "scale": LOG2E * width**-0.5,
    }
    constants = {"K": width, "BLOCK": BLOCK, "LOG2_BLOCK": math.log2(BLOCK)}
    if tiling.kernel is _PORTABLE:
        constants["BLOCK_N"] = tiling.keys
    launch(
        tiling.kernel,
        (blocks * heads,),
        arguments,
        constants,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out


def stand_ins(kept: Tensor) -> Tensor:
    """Return a bit for every mean that stands in for its block: [N, B, n] -> [N, B, 2 M] int64.

    A block's bit is 0 where the block is kept; so are those past the last block.
    """
    heads, blocks, _ = kept.shape
    words = torch.zeros(blocks_of(blocks) * BLOCK // _WORD, dtype=torch.int64)
    for word in range(cdiv(blocks, _WORD)):
        words[word] = -1 if blocks >= (word + 1) * _WORD else (1 << blocks % _WORD) - 1
    result = words.to(kept.device).repeat(heads, blocks, 1)
    block = kept.long()
    return result.scatter_add_(2, block // _WORD, -torch.bitwise_left_shift(1, block % _WORD))
