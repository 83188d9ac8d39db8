# SPDX-License-Identifier: Apache-2.0
"""Prepare queries and keys for attention: RMS norm over all heads, then rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from pw_kernels.launcher import launch, next_power_of_2
from pw_kernels.op import FLOATS, Cost, Op, register, require, select
from pw_kernels.variant import Kernel

_KERNEL = Kernel("qk_norm_rope")


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    origin: Tensor,
    num_heads: int,
    eps: float,
) -> None:
    """Apply `rms_norm`, then `rope`, to queries and keys of self-attention, in place.

    Args:
        q: [S, D] projected queries, overwritten; rows may be strided, as in a packed projection.
        k: [S, D] projected keys, overwritten; shares no memory with q.
        weight_q: [D], in q's dtype.
        weight_k: [D].
        cos: [L, K/2] fp32, L at least the longest side of the token grid: row p, column j is the
            cosine for pair j at position p along the axis of that pair (`axis_pairs`).
        sin: [L, K/2] fp32.
        origin: [3] int64, on the device so that one compiled graph serves every clip: index in
            the clip of q's first row, then H/2 and W/2 of the token grid.
        num_heads: N; D = N * K.
        eps: added to the mean square.
    """
    triton = select("qk_norm_rope", q.device) == "triton"
    run = torch.ops.pw.qk_norm_rope if triton else reference
    run(q, k, weight_q, weight_k, cos, sin, origin, num_heads, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    fp32 inside; rounded to x's dtype before and after the weight (official WanRMSNorm).

    Args:
        x: [..., D].
        weight: [D], in x's dtype.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def axis_pairs(pairs: int) -> tuple[int, int, int]:
    """Split a head's channel pairs among time, row and column, in this order."""
    third = pairs // 3
    return pairs - 2 * third, third, third


def angles_of_tokens(table: Tensor, origin: Tensor, tokens: int) -> Tensor:
    """Expand a table by position, [L, K/2], to one by token, [S, K/2], for `tokens` from `origin`.

    Args:
        table: [L, K/2] by position along an axis.
        origin: [3] int64 as in `qk_norm_rope`.
        tokens: S.
    """
    first, rows, columns = origin.unbind()
    token = torch.arange(tokens, device=table.device) + first
    # why not // and %: an exporter has to spell out what those do with negative numbers
    line = token.div(columns, rounding_mode="trunc")
    frame = line.div(rows, rounding_mode="trunc")
    positions = (frame, line - frame * rows, token - line * columns)
    parts = table.split(axis_pairs(table.shape[1]), dim=1)
    angles = [part.index_select(0, at) for part, at in zip(parts, positions, strict=True)]
    return torch.cat(angles, dim=1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved channel pairs (2j, 2j+1) by the angles of each token.

    Args:
        x: [S, N, K].
        cos: [S, K/2] fp32.
        sin: [S, K/2] fp32.

    Returns:
        [S, N, K] in x's dtype, computed in fp32.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [S, N, K/2]
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def reference(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    origin: Tensor,
    num_heads: int,
    eps: float,
) -> None:
    """Oracle of `qk_norm_rope`."""
    cos, sin = (angles_of_tokens(table, origin, q.shape[0]) for table in (cos, sin))
    for x, weight in ((q, weight_q), (k, weight_k)):
        heads = rms_norm(x, weight, eps).unflatten(-1, (num_heads, -1))
        x.copy_(rope(heads, cos, sin).flatten(1))


def cost(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *_: object,
) -> Cost:
    """Count one read and one write of q and k, and the (negligible) tables and weights."""
    moved = 2 * (q.numel() + k.numel()) * q.element_size()
    angles = (cos.numel() + sin.numel()) * cos.element_size()
    weights = (weight_q.numel() + weight_k.numel()) * weight_q.element_size()
    return Cost(flops=7 * (q.numel() + k.numel()), bytes=moved + angles + weights)


def _check(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    origin: Tensor,
    num_heads: int,
) -> None:
    name = "qk_norm_rope"
    require(q.dim() == 2, name, "q [S, D]", tuple(q.shape))
    require(k.shape == q.shape, name, f"k of q's shape {tuple(q.shape)}", tuple(k.shape))
    require(q.numel() > 0, name, "at least one token", tuple(q.shape))
    dim = q.shape[1]
    require(q.dtype in FLOATS, name, "q fp32, bf16 or fp16", q.dtype)
    expected = f"num_heads that splits {dim} channels into heads of even width"
    require(num_heads > 0 and dim % (2 * num_heads) == 0, name, expected, num_heads)
    for x in (q, k):
        require(x.stride(1) == 1, name, "q and k contiguous along D", x.stride())
        require(x.stride(0) >= dim, name, "rows of q and k that do not overlap", x.stride())
    for weight in (weight_q, weight_k):
        require(weight.shape == (dim,), name, f"weights of shape ({dim},)", tuple(weight.shape))
        require(weight.is_contiguous(), name, "contiguous weights", weight.stride())
    for other in (k, weight_q, weight_k):
        require(other.dtype == q.dtype, name, f"k and weights in q's {q.dtype}", other.dtype)
    require(origin.shape == (3,), name, "origin [3]", tuple(origin.shape))
    require(origin.dtype == torch.int64, name, "origin in int64", origin.dtype)
    require(origin.is_contiguous(), name, "contiguous origin", origin.stride())
    pairs = dim // num_heads // 2
    for table in (cos, sin):
        fits = table.dim() == 2 and table.shape[0] > 0 and table.shape[1] == pairs
        expected = f"cos and sin of shape (1 or more, {pairs})"
        require(fits, name, expected, tuple(table.shape))
        require(table.dtype == torch.float32, name, "cos and sin in fp32", table.dtype)
        require(table.is_contiguous(), name, "contiguous cos and sin", table.stride())
    require(cos.shape == sin.shape, name, "cos and sin of one shape", tuple(sin.shape))
    for other in (k, weight_q, weight_k, cos, sin, origin):
        require(other.device == q.device, name, f"all tensors on {q.device}", other.device)


_op = torch.library.custom_op("pw::qk_norm_rope", reference, mutates_args=("q", "k"))
_op.register_fake(lambda *_: None)


@_op.register_kernel("cuda")
def run_kernel(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    origin: Tensor,
    num_heads: int,
    eps: float,
) -> None:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    _check(q, k, weight_q, weight_k, cos, sin, origin, num_heads)
    tokens, dim = q.shape
    width = dim // num_heads
    t_pairs, h_pairs, _ = axis_pairs(width // 2)
    block_n, block_k = next_power_of_2(num_heads), next_power_of_2(width)
    launch(
        _KERNEL,
        (tokens,),
        {
            "q_ptr": q,
            "k_ptr": k,
            "weight_q_ptr": weight_q,
            "weight_k_ptr": weight_k,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "origin_ptr": origin,
            "q_stride": q.stride(0),
            "k_stride": k.stride(0),
            "eps": eps,
        },
        {
            "N": num_heads,
            "K": width,
            "T_PAIRS": t_pairs,
            "H_PAIRS": h_pairs,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        num_warps=num_warps(block_n * block_k),
    )


def num_warps(block: int) -> int:
    """Return the warps of a program for a token of up to `block` channels, padding included.

    A warp has 1024 channels: 24 heads of 128 channels are three passes of 4 warps, all busy.
    """
    return min(16, max(1, block // 1024))


OP = register(Op("qk_norm_rope", reference, cost, run_kernel))
