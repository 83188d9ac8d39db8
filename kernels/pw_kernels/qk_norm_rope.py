# SPDX-License-Identifier: Apache-2.0
"""What happens to queries and keys before attention: RMS norm over all heads, then rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from pw_kernels.launcher import Kernel, launch, next_power_of_2
from pw_kernels.op import Cost, Op, chosen, register, require

_KERNEL = Kernel("qk_norm_rope")


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    place: Tensor,
    num_heads: int,
    eps: float,
) -> None:
    """`rms_norm`, then `rope`, of the queries and keys of self-attention, in place.

    Args:
        q: [S, D] projected queries, overwritten; rows may be strided, as in a packed projection.
        k: [S, D] projected keys, overwritten; no memory shared with q.
        gain_q: [D], in q's dtype.
        gain_k: [D].
        cos: [L, K/2] fp32, L at least the longest side of the token grid: column j of row p is the
            cosine for pair j at position p along the axis that pair j turns with (`axis_pairs`).
        sin: [L, K/2] fp32.
        place: [3] int64, on the device so that one compiled graph serves every clip: place in the
            clip of the first row of q, then H/2 and W/2 of the token grid.
        num_heads: N; D = N * K.
        eps: added to the mean square.
    """
    if chosen("qk_norm_rope", q.device).implementation == "triton":
        _check(q, k, gain_q, gain_k, cos, sin, place, num_heads)
        torch.ops.pw.qk_norm_rope(q, k, gain_q, gain_k, cos, sin, place, num_heads, eps)
    else:
        reference(q, k, gain_q, gain_k, cos, sin, place, num_heads, eps)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension.

    fp32 inside; rounded to x's dtype before and after the gain (official WanRMSNorm).

    Args:
        x: [..., D].
        gain: [D], in x's dtype.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * gain


def axis_pairs(pairs: int) -> tuple[int, int, int]:
    """How many of a head's channel pairs turn with time, row and column, in this order."""
    third = pairs // 3
    return pairs - 2 * third, third, third


def angles_of_tokens(table: Tensor, place: Tensor, tokens: int) -> Tensor:
    """[L, K/2] by position along an axis -> [S, K/2] by token, S tokens from `place` on."""
    first, rows, columns = place.unbind()
    token = torch.arange(tokens, device=table.device) + first
    # why not // and %: an exporter has to spell out what those do with negative numbers
    line = token.div(columns, rounding_mode="trunc")
    frame = line.div(rows, rounding_mode="trunc")
    positions = (frame, line - frame * rows, token - line * columns)
    parts = table.split(axis_pairs(table.shape[1]), dim=1)
    turned = [part.index_select(0, at) for part, at in zip(parts, positions, strict=True)]
    return torch.cat(turned, dim=1)


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
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    place: Tensor,
    num_heads: int,
    eps: float,
) -> None:
    """The oracle of `qk_norm_rope`."""
    cos, sin = (angles_of_tokens(table, place, q.shape[0]) for table in (cos, sin))
    for x, gain in ((q, gain_q), (k, gain_k)):
        heads = rms_norm(x, gain, eps).unflatten(-1, (num_heads, -1))
        x.copy_(rope(heads, cos, sin).flatten(1))


def cost(
    q: Tensor,
    k: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    place: Tensor,
    num_heads: int,
    eps: float,
) -> Cost:
    """One read and one write of q and k; the tables and gains are negligible but counted."""
    moved = 2 * (q.numel() + k.numel()) * q.element_size()
    angles = (cos.numel() + sin.numel()) * cos.element_size()
    gains = (gain_q.numel() + gain_k.numel()) * gain_q.element_size()
    return Cost(flops=7 * (q.numel() + k.numel()), bytes=moved + angles + gains)


def _check(
    q: Tensor,
    k: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    place: Tensor,
    num_heads: int,
) -> None:
    name, kinds = "qk_norm_rope", (torch.float32, torch.bfloat16, torch.float16)
    require(q.dim() == 2, name, "q [S, D]", tuple(q.shape))
    require(k.shape == q.shape, name, f"k of q's shape {tuple(q.shape)}", tuple(k.shape))
    require(q.numel() > 0, name, "at least one token", tuple(q.shape))
    dim = q.shape[1]
    require(q.dtype in kinds, name, "q fp32, bf16 or fp16", q.dtype)
    wanted = f"num_heads that splits {dim} channels into heads of even width"
    require(num_heads > 0 and dim % (2 * num_heads) == 0, name, wanted, num_heads)
    for row in (q, k):
        require(row.stride(1) == 1, name, "q and k contiguous along D", row.stride())
        require(row.stride(0) >= dim, name, "rows of q and k apart", row.stride())
    for gain in (gain_q, gain_k):
        require(gain.shape == (dim,), name, f"gains of shape ({dim},)", tuple(gain.shape))
        require(gain.is_contiguous(), name, "contiguous gains", gain.stride())
    for other in (k, gain_q, gain_k):
        require(other.dtype == q.dtype, name, f"k and gains in q's {q.dtype}", other.dtype)
    require(place.shape == (3,), name, "place [3]", tuple(place.shape))
    require(place.dtype == torch.int64, name, "place in int64", place.dtype)
    require(place.is_contiguous(), name, "contiguous place", place.stride())
    pairs = dim // num_heads // 2
    for table in (cos, sin):
        fits = table.dim() == 2 and table.shape[0] > 0 and table.shape[1] == pairs
        wanted = f"cos and sin of shape (1 or more, {pairs})"
        require(fits, name, wanted, tuple(table.shape))
        require(table.dtype == torch.float32, name, "cos and sin in fp32", table.dtype)
        require(table.is_contiguous(), name, "contiguous cos and sin", table.stride())
    require(cos.shape == sin.shape, name, "cos and sin of one shape", tuple(sin.shape))
    for other in (k, gain_q, gain_k, cos, sin, place):
        require(other.device == q.device, name, f"all tensors on {q.device}", other.device)


@torch.library.custom_op("pw::qk_norm_rope", mutates_args=("q", "k"))
def _op(
    q: torch.Tensor,
    k: torch.Tensor,
    gain_q: torch.Tensor,
    gain_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    place: torch.Tensor,
    num_heads: int,
    eps: float,
) -> None:
    reference(q, k, gain_q, gain_k, cos, sin, place, num_heads, eps)


@_op.register_kernel("cuda")
def run_kernel(
    q: Tensor,
    k: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    place: Tensor,
    num_heads: int,
    eps: float,
) -> None:
    """Launch the kernel; the input was checked by the caller."""
    tokens, dim = q.shape
    width = dim // num_heads
    time, row, _ = axis_pairs(width // 2)
    block_n, block_k = next_power_of_2(num_heads), next_power_of_2(width)
    launch(
        _KERNEL,
        (tokens,),
        {
            "q_ptr": q,
            "k_ptr": k,
            "gain_q_ptr": gain_q,
            "gain_k_ptr": gain_k,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "place_ptr": place,
            "q_stride": q.stride(0),
            "k_stride": k.stride(0),
            "eps": eps,
        },
        {
            **{"N": num_heads, "K": width, "TIME": time, "ROW": row},
            **{"BLOCK_N": block_n, "BLOCK_K": block_k},
        },
        num_warps=num_warps(block_n * block_k),
    )


def num_warps(block: int) -> int:
    """Warps of a program for a token of up to `block` channels, padding included.

    1024 channels a warp: the 24 heads of 128 channels are three passes of 4 warps, all busy.
    """
    return min(16, max(1, block // 1024))


@_op.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    place: Tensor,
    num_heads: int,
    eps: float,
) -> None:
    return None


OP = register(Op("qk_norm_rope", reference, cost, run_kernel))
