# SPDX-License-Identifier: Apache-2.0
"""Join attention over parts of the keys into attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pw_kernels.op import Cost, Op, register, require


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute out = sum_i exp(lse_i - lse) out_i with lse = ln(sum_i exp(lse_i)).

    Exact up to rounding: each part carries the sum of its own exponentials. fp32 inside, one
    rounding at the end.

    Args:
        outs: results [S, N, K] of `attention_with_lse` for the same queries and disjoint keys.
        lses: their log-sum-exps [S, N] fp32.

    Returns:
        [S, N, K] in the dtype of `outs`, and [S, N] fp32: as `attention_with_lse` of all keys.

    Raises:
        ValueError: no part, or parts that do not match.
    """
    _check(outs, lses)
    return reference(outs, lses)


def reference(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Oracle of `merge_attention`."""
    lse = torch.stack(tuple(lses)).logsumexp(0)
    merged = torch.zeros_like(outs[0], dtype=torch.float32)
    for out, part in zip(outs, lses, strict=True):
        merged = merged + (part - lse).exp()[..., None] * out.float()
    return merged.to(outs[0].dtype), lse


def cost(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Cost:
    """Count one read of every part, one write of the result."""
    part = outs[0].numel() * outs[0].element_size() + lses[0].numel() * lses[0].element_size()
    return Cost(flops=2 * len(outs) * outs[0].numel(), bytes=(len(outs) + 1) * part)


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    name = "merge_attention"
    require(len(outs) > 0, name, "at least one part", len(outs))
    require(len(outs) == len(lses), name, f"{len(outs)} log-sum-exps, one per part", len(lses))
    first = outs[0]
    require(first.dim() == 3, name, "parts [S, N, K]", tuple(first.shape))
    for out, lse in zip(outs, lses, strict=True):
        shape = tuple(first.shape)
        require(out.shape == first.shape, name, f"every part {shape}", tuple(out.shape))
        require(out.dtype == first.dtype, name, f"every part in {first.dtype}", out.dtype)
        require(lse.shape == shape[:2], name, f"log-sum-exps {shape[:2]}", tuple(lse.shape))
        require(lse.dtype == torch.float32, name, "log-sum-exps in fp32", lse.dtype)
        for x in (out, lse):
            require(x.device == first.device, name, f"all tensors on {first.device}", x.device)


OP = register(Op("merge_attention", reference, cost))
