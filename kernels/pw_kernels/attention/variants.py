# SPDX-License-Identifier: Apache-2.0
"""Choose and launch the kernel of `pw_kernels.attention` for a GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pw_kernels.launcher import cdiv, launch, multiprocessors
from pw_kernels.op import require
from pw_kernels.variant import Argument, Kernel

LOG2E = math.log2(math.e)


class Tiling(NamedTuple):
    """A kernel, the tile that one program works on at a time, and its warps."""

    kernel: Kernel
    queries: int
    keys: int
    num_warps: int
    num_stages: int


_COUNTS = frozenset({"n_queries", "n_keys", "n_heads"})
_PORTABLE = Kernel("attention_portable", _COUNTS)
_HOPPER = Kernel("attention_hopper", _COUNTS)
_GLUON = Kernel("attention_gluon", _COUNTS)

# Head width -> tiling. With 128 queries each key is read once for 128 rows, which keeps L2 ahead
# of the tensor cores; keys and stages are the most that neither spill registers nor exceed the
# shared memory, as compiled by Triton 3.7.1 (tests/kernels/test_attention_compiled.py).
LARGE = {64: Tiling(_PORTABLE, 128, 64, 8, 3), 128: Tiling(_PORTABLE, 128, 64, 8, 2)}
# for 99 KB of shared memory instead of 163 or 227; 64 keys of width 128 would spill
SMALL = {64: Tiling(_PORTABLE, 128, 64, 8, 3), 128: Tiling(_PORTABLE, 128, 32, 8, 2)}
# 4 warps and 128 queries are what the compiler specialises, see attention_hopper; 193 KB
HOPPER = {64: Tiling(_HOPPER, 128, 128, 4, 2), 128: Tiling(_HOPPER, 128, 128, 4, 2)}
# as many slots for keys and for values as shared memory holds: 224 KB with the queries
GLUON = {64: Tiling(_GLUON, 128, 128, 4, 4), 128: Tiling(_GLUON, 128, 128, 4, 3)}
SMALL_CAPABILITIES = ((8, 6), (8, 9), (12, 0), (12, 1))


def tiling_for(
    gpu: tuple[int, int], width: int, *, bias: bool = False, gluon: bool = False
) -> Tiling:
    """Return the kernel and tiling for a GPU of this compute capability and heads of this width.

    Only the portable kernel takes a bias: it is for the short attention to the text.

    Raises ValueError where the Gluon kernel is requested on anything but Hopper.
    """
    if gluon:
        require(gpu == (9, 0), "attention", "compute capability 9.0 for gluon", gpu)
    if bias or gpu[0] != 9:
        return (SMALL if gpu in SMALL_CAPABILITIES else LARGE)[width]
    return (GLUON if gluon else HOPPER)[width]


def tilings_of(gpu: tuple[int, int]) -> tuple[Tiling, ...]:
    """Return every tiling that a GPU of this compute capability may launch."""
    return tuple(
        tiling_for(gpu, width, bias=bias, gluon=gluon)
        for width in LARGE
        for bias in (False, True)
        for gluon in (False, True)
        if gpu == (9, 0) or not gluon
    )


def run(
    tiling: Tiling, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch a kernel; return out [S, N, K] and lse [S, N] as `attention_with_lse`."""
    queries, heads, width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((queries, heads), dtype=torch.float32)
    arguments: dict[str, Argument] = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "lse_ptr": lse,
        "n_queries": queries,
        "n_keys": k.shape[0],
        "n_heads": heads,
        "q_stride": _token_stride(q),
        "k_stride": _token_stride(k),
        "v_stride": _token_stride(v),
        "scale": LOG2E * width**-0.5,
    }
    constants = {"K": width, "BLOCK_M": tiling.queries, "BLOCK_N": tiling.keys}
    programs = cdiv(queries, tiling.queries) * heads
    if tiling.kernel is _GLUON:  # a program processes several tiles
        programs = min(programs, multiprocessors(q.device))
        constants["STAGES"] = tiling.num_stages
    if tiling.kernel is _PORTABLE:
        arguments["bias_ptr"] = q if bias is None else bias  # q: not read
        constants["HAS_BIAS"] = bias is not None
    launch(
        tiling.kernel,
        (programs,),
        arguments,
        constants,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out, lse


def _token_stride(x: Tensor) -> int:
    """Return the elements between tokens; PyTorch's stride for a single token is arbitrary."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1] * x.shape[2]
