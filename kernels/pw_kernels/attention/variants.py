# SPDX-License-Identifier: Apache-2.0
"""Which kernel of `pw_kernels.attention` runs on which GPU, in which tiles; its launch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pw_kernels.launcher import Argument, Kernel, cdiv, launch, multiprocessors
from pw_kernels.op import require

LOG2E = math.log2(math.e)


class Variant(NamedTuple):
    """A kernel, what one program of it works on at a time, and with how many warps."""

    kernel: Kernel
    queries: int
    keys: int
    num_warps: int
    num_stages: int


_COUNTS = frozenset({"n_queries", "n_keys", "n_heads"})
_PORTABLE = Kernel("attention_portable", _COUNTS)
_HOPPER = Kernel("attention_hopper", _COUNTS)
_GLUON = Kernel("attention_gluon", _COUNTS)

# Head width -> variant. 128 queries read each key once for 128 rows, which keeps L2 ahead of the
# tensor cores; keys and stages are the most that neither spill a register nor leave the limit of
# shared memory, as compiled by Triton 3.7.1 (tests/kernels/test_attention_compiled.py).
LARGE = {64: Variant(_PORTABLE, 128, 64, 8, 3), 128: Variant(_PORTABLE, 128, 64, 8, 2)}
# 99 KB of shared memory instead of 163 or 227, and spills at 64 keys of width 128.
SMALL = {64: Variant(_PORTABLE, 128, 64, 8, 3), 128: Variant(_PORTABLE, 128, 32, 8, 2)}
# 4 warps and 128 queries are what the compiler specialises, see attention_hopper; 193 KB.
HOPPER = {64: Variant(_HOPPER, 128, 128, 4, 2), 128: Variant(_HOPPER, 128, 128, 4, 2)}
# As many slots for keys and for values as shared memory holds: 224 KB of them and queries.
GLUON = {64: Variant(_GLUON, 128, 128, 4, 4), 128: Variant(_GLUON, 128, 128, 4, 3)}
_SMALL_CAPABILITIES = ((8, 6), (8, 9), (12, 0), (12, 1))


def variant_for(
    gpu: tuple[int, int], width: int, *, bias: bool = False, gluon: bool = False
) -> Variant:
    """The kernel for a GPU of this compute capability and heads of this width.

    Only the portable one takes a bias: it is for the short attention to the text.

    Raises ValueError where the Gluon kernel is asked for on anything but Hopper.
    """
    if gluon:
        require(gpu == (9, 0), "attention", "compute capability 9.0 for gluon", gpu)
    if bias or gpu[0] != 9:
        return (SMALL if gpu in _SMALL_CAPABILITIES else LARGE)[width]
    return (GLUON if gluon else HOPPER)[width]


def run(
    variant: Variant, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launch one variant; out [S, N, K] and lse [S, N] as of `pw_kernels.attention`."""
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
    constants = {"K": width, "BLOCK_M": variant.queries, "BLOCK_N": variant.keys}
    programs = cdiv(queries, variant.queries) * heads
    if variant.kernel is _GLUON:  # its programs go through several tiles each
        programs = min(programs, multiprocessors(q.device))
        constants["STAGES"] = variant.num_stages
    if variant.kernel is _PORTABLE:
        arguments["bias_ptr"] = q if bias is None else bias  # q: not read
        constants["HAS_BIAS"] = bias is not None
    launch(
        variant.kernel,
        (programs,),
        arguments,
        constants,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
    )
    return out, lse


def _token_stride(x: Tensor) -> int:
    """Elements from one token to the next; that of a single token means nothing in PyTorch."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1] * x.shape[2]
