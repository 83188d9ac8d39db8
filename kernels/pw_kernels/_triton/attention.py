# SPDX-License-Identifier: Apache-2.0
"""Which Triton kernel of `pw_kernels.attention` runs on which GPU, in which tiles; its launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pw_kernels._triton import attention_hopper, attention_portable

LOG2E = math.log2(math.e)


class Variant(NamedTuple):
    """A kernel, what one program of it works on at a time, and with how many warps."""

    kernel: Any
    queries: int
    keys: int
    num_warps: int
    num_stages: int


_PORTABLE = attention_portable.kernel
_HOPPER = attention_hopper.kernel

# Head width -> variant. 128 queries read each key once for 128 rows, which keeps L2 ahead of the
# tensor cores; keys and stages are the most that neither spill a register nor leave the limit of
# shared memory, as compiled by Triton 3.7.1 (tests/kernels/test_attention_compiled.py).
LARGE = {64: Variant(_PORTABLE, 128, 64, 8, 3), 128: Variant(_PORTABLE, 128, 64, 8, 2)}
# 99 KB of shared memory instead of 163 or 227, and spills at 64 keys of width 128.
SMALL = {64: Variant(_PORTABLE, 128, 64, 8, 3), 128: Variant(_PORTABLE, 128, 32, 8, 2)}
# 4 warps and 128 queries are what the compiler specialises, see attention_hopper; 193 KB.
HOPPER = {64: Variant(_HOPPER, 128, 128, 4, 2), 128: Variant(_HOPPER, 128, 128, 4, 2)}
_SMALL_CAPABILITIES = ((8, 6), (8, 9), (12, 0), (12, 1))


def variant_for(capability: tuple[int, int], width: int) -> Variant:
    """The kernel for a GPU of this compute capability and heads of this width."""
    if capability[0] == 9:
        return HOPPER[width]
    return (SMALL if capability in _SMALL_CAPABILITIES else LARGE)[width]


def launch(q: Tensor, k: Tensor, v: Tensor, last_biases: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Run the kernel for this GPU; the input was checked by the caller."""
    variant = variant_for(torch.cuda.get_device_capability(q.device), q.shape[2])
    return run(variant, q, k, v, last_biases)


def run(
    variant: Variant, q: Tensor, k: Tensor, v: Tensor, last_biases: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    """Run one variant; out [S, N, K] and lse [S, N] as of `pw_kernels.attention`."""
    queries, heads, width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((queries, heads), dtype=torch.float32)
    biases = [LOG2E * bias for bias in last_biases]
    if variant.kernel is _HOPPER:
        triton.set_allocator(_descriptor_memory)
    with torch.cuda.device_of(q):  # Triton launches on the current device, not on q's
        variant.kernel[(triton.cdiv(queries, variant.queries) * heads,)](
            q,
            k,
            v,
            out,
            lse,
            queries,
            k.shape[0],
            heads,
            _token_stride(q),
            _token_stride(k),
            _token_stride(v),
            LOG2E * width**-0.5,
            *biases,
            *[0.0] * (4 - len(biases)),  # not read
            K=width,
            N_BIASES=len(biases),
            BLOCK_M=variant.queries,
            BLOCK_N=variant.keys,
            num_warps=variant.num_warps,
            num_stages=variant.num_stages,
        )
    return out, lse


def _token_stride(x: Tensor) -> int:
    """Elements from one token to the next; that of a single token means nothing in PyTorch."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1] * x.shape[2]


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel on the current GPU keeps the descriptors it makes; alignment is below 512."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
