# SPDX-License-Identifier: Apache-2.0
"""Attention of one head that is too wide for a fused kernel, over chunks of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from pw_kernels.op import Cost, Op, register, require

SCORE_BYTES = 256 * 2**20  # limit for the scores of one step


def chunked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q kT / sqrt(K)) v of a single head, a chunk of queries at a time.

    The VAE's middle block attends with one head as wide as all its channels (1024), which no
    flash-attention kernel takes, over up to 32160 positions: the scores of all rows would take
    4 GB. Rows are independent, so the result is exact up to rounding. Scores, sums and products
    are fp32 for narrower inputs; the result is rounded once.

    Args:
        q: [S, K] queries.
        k: [E, K] keys.
        v: [E, K] values.

    Returns:
        [S, K] in q's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or no token.
    """
    _check(q, k, v)
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(dtype).T, v.to(dtype)
    rows = score_rows(len(k), dtype)
    out = q.new_empty((len(q), v.shape[1]))
    for part, result in zip(q.split(rows), out.split(rows), strict=True):
        scores = part.to(dtype) * q.shape[1] ** -0.5 @ keys  # [rows, E], the one large tensor
        scores.sub_(scores.amax(dim=1, keepdim=True)).exp_()
        result.copy_((scores @ values).div_(scores.sum(dim=1, keepdim=True)))
        del scores  # before the next ones are allocated
    return out


def score_rows(keys: int, dtype: torch.dtype) -> int:
    """Return how many rows of queries keep their scores within SCORE_BYTES; at least one."""
    return max(1, SCORE_BYTES // (keys * dtype.itemsize))


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Oracle of `chunked_attention`: all scores at once."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).T * q.shape[1] ** -0.5
    return (scores.softmax(dim=1) @ v.to(dtype)).to(q.dtype)


def cost(q: Tensor, k: Tensor, v: Tensor) -> Cost:
    """Count two products of 2 S E K FLOPs, one read of q, k, v, one write of the result."""
    moved = (2 * q.numel() + k.numel() + v.numel()) * q.element_size()
    return Cost(flops=4 * q.numel() * k.shape[0], bytes=moved)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    name = "chunked_attention"
    require(q.dim() == 2, name, "q [S, K]", tuple(q.shape))
    keys = k.dim() == 2 and k.shape[1] == q.shape[1]
    require(keys, name, f"k [E, {q.shape[1]}]", tuple(k.shape))
    require(v.shape == k.shape, name, f"v of k's shape {tuple(k.shape)}", tuple(v.shape))
    require(len(q) > 0 and len(k) > 0, name, "at least one query and one key", (len(q), len(k)))
    for x in (k, v):
        require(x.dtype == q.dtype, name, f"q, k and v of one dtype, {q.dtype}", x.dtype)
        require(x.device == q.device, name, f"all tensors on {q.device}", x.device)


OP = register(Op("chunked_attention", reference, cost))
