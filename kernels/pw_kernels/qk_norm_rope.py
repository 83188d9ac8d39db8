# SPDX-License-Identifier: Apache-2.0
"""What happens to queries and keys before attention: RMS norm over all heads, then rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from pw_kernels.launcher import Kernel, launch
from pw_kernels.op import Cost, Op, chosen, register, require
from pw_kernels.row_block import row_block

_KERNEL = Kernel("qk_norm_rope")


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`rms_norm`, then `rope`, of the queries and keys of self-attention.

    Args:
        q: [S, D] projected queries; rows may be strided, as in a packed projection.
        k: [S, D] projected keys.
        gain_q: [D], in q's dtype.
        gain_k: [D].
        cos: [S, K/2] fp32.
        sin: [S, K/2] fp32.
        num_heads: N; D = N * K.
        eps: added to the mean square.

    Returns:
        q and k, [S, N, K] each in q's dtype.
    """
    if chosen("qk_norm_rope", q.device).implementation == "triton":
        _check(q, k, gain_q, gain_k, cos, sin, num_heads)
        outs: tuple[Tensor, Tensor] = torch.ops.pw.qk_norm_rope(
            q, k, gain_q, gain_k, cos, sin, num_heads, eps
        )
        return outs
    return reference(q, k, gain_q, gain_k, cos, sin, num_heads, eps)


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
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The oracle of `qk_norm_rope`."""
    heads = (num_heads, -1)
    return (
        rope(rms_norm(q, gain_q, eps).unflatten(-1, heads), cos, sin),
        rope(rms_norm(k, gain_k, eps).unflatten(-1, heads), cos, sin),
    )


def cost(
    q: Tensor,
    k: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> Cost:
    """One read and one write of q and k, one read of the angles; the gains are counted too."""
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
    num_heads: int,
) -> None:
    name, kinds = "qk_norm_rope", (torch.float32, torch.bfloat16, torch.float16)
    require(q.dim() == 2, name, "q [S, D]", tuple(q.shape))
    require(k.shape == q.shape, name, f"k of q's shape {tuple(q.shape)}", tuple(k.shape))
    require(q.numel() > 0, name, "at least one token", tuple(q.shape))
    tokens, dim = q.shape
    require(q.dtype in kinds, name, "q fp32, bf16 or fp16", q.dtype)
    wanted = f"num_heads that splits {dim} channels into heads of even width"
    require(num_heads > 0 and dim % (2 * num_heads) == 0, name, wanted, num_heads)
    for row in (q, k):
        require(row.stride(1) == 1, name, "q and k contiguous along D", row.stride())
    for gain in (gain_q, gain_k):
        require(gain.shape == (dim,), name, f"gains of shape ({dim},)", tuple(gain.shape))
        require(gain.is_contiguous(), name, "contiguous gains", gain.stride())
    for other in (k, gain_q, gain_k):
        require(other.dtype == q.dtype, name, f"k and gains in q's {q.dtype}", other.dtype)
    table = (tokens, dim // num_heads // 2)
    for angles in (cos, sin):
        require(angles.shape == table, name, f"cos and sin of shape {table}", tuple(angles.shape))
        require(angles.dtype == torch.float32, name, "cos and sin in fp32", angles.dtype)
        require(angles.is_contiguous(), name, "contiguous cos and sin", angles.stride())
    for other in (k, gain_q, gain_k, cos, sin):
        require(other.device == q.device, name, f"all tensors on {q.device}", other.device)


@torch.library.custom_op("pw::qk_norm_rope", mutates_args=())
def _op(
    q: torch.Tensor,
    k: torch.Tensor,
    gain_q: torch.Tensor,
    gain_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference(q, k, gain_q, gain_k, cos, sin, num_heads, eps)


@_op.register_kernel("cuda")
def run_kernel(
    q: Tensor,
    k: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; the input was checked by the caller."""
    tokens, dim = q.shape
    q_out = q.new_empty(tokens, num_heads, dim // num_heads)
    k_out = torch.empty_like(q_out)
    block, num_warps = row_block(dim)
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
            "q_out_ptr": q_out,
            "k_out_ptr": k_out,
            "q_stride": q.stride(0),
            "k_stride": k.stride(0),
            "eps": eps,
        },
        {"D": dim, "PAIRS": dim // num_heads // 2, "BLOCK": block},
        num_warps=num_warps,
    )
    return q_out, k_out


@_op.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    gain_q: Tensor,
    gain_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], num_heads, q.shape[1] // num_heads)
    return q.new_empty(shape), k.new_empty(shape)


OP = register(Op("qk_norm_rope", reference, cost))
