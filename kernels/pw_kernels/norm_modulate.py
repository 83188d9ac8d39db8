# SPDX-License-Identifier: Apache-2.0
"""LayerNorm without parameters, scaled and shifted by the timestep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.launcher import Kernel, launch
from pw_kernels.op import Cost, Op, chosen, register, require
from pw_kernels.row_block import row_block

_KERNEL = Kernel("norm_modulate", any_number=frozenset({"tokens_per_row"}))


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """LN(x) * (1 + scale) + shift in fp32, rounded once to `out_dtype`.

    The normalised value is first rounded to x's dtype, as the official WanLayerNorm does:
    it matters in block 0 alone, where x still is the bf16 patch embedding.

    Args:
        x: [S, D] residual stream.
        shift: [R, D] fp32; row r serves tokens r*S/R .. (r+1)*S/R.
        scale: [R, D] fp32.
        eps: added to the variance.
        out_dtype: dtype of the result (the GEMM input).

    Returns:
        [S, D].
    """
    if chosen("norm_modulate", x.device).implementation == "triton":
        _check(x, shift, scale)
        out: Tensor = torch.ops.pw.norm_modulate(x, shift, scale, eps, out_dtype)
        return out
    return reference(x, shift, scale, eps, out_dtype)


def reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """The oracle of `norm_modulate`."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype).float()
    rows = normed.unflatten(0, (shift.shape[0], -1))  # [R, S/R, D]
    return (rows * (1 + scale[:, None]) + shift[:, None]).flatten(0, 1).to(out_dtype)


def cost(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype) -> Cost:
    """One read of x, one write of the result; the rows are negligible but counted."""
    moved = x.numel() * (x.element_size() + out_dtype.itemsize)
    return Cost(flops=9 * x.numel(), bytes=moved + 2 * shift.numel() * shift.element_size())


def _check(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    name, kinds = "norm_modulate", (torch.float32, torch.bfloat16, torch.float16)
    require(x.dim() == 2 and x.is_contiguous(), name, "x contiguous [S, D]", tuple(x.shape))
    require(x.numel() > 0, name, "at least one token", tuple(x.shape))
    require(x.dtype in kinds, name, "x fp32, bf16 or fp16", x.dtype)
    for row in (shift, scale):
        wanted = f"rows [R, {x.shape[1]}] with R dividing the {x.shape[0]} tokens"
        fits = row.dim() == 2 and row.shape[1] == x.shape[1] and row.shape[0] > 0
        require(fits and x.shape[0] % row.shape[0] == 0, name, wanted, tuple(row.shape))
        require(row.dtype == torch.float32, name, "fp32 rows", row.dtype)
        require(row.stride(1) == 1, name, "rows contiguous along D", row.stride())
        require(row.device == x.device, name, f"all tensors on {x.device}", row.device)
    require(shift.shape == scale.shape, name, "shift and scale of one shape", tuple(scale.shape))


@torch.library.custom_op("pw::norm_modulate", mutates_args=())
def _op(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return reference(x, shift, scale, eps, out_dtype)


@_op.register_kernel("cuda")
def run_kernel(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Launch the kernel; the input was checked by the caller."""
    tokens, dim = x.shape
    if scale.stride() != shift.stride():  # rows are views into one modulation tensor, usually
        shift, scale = shift.contiguous(), scale.contiguous()
    out = torch.empty_like(x, dtype=out_dtype)
    block, num_warps = row_block(dim)
    launch(
        _KERNEL,
        (tokens,),
        {
            "x_ptr": x,
            "shift_ptr": shift,
            "scale_ptr": scale,
            "out_ptr": out,
            "tokens_per_row": tokens // shift.shape[0],
            "row_stride": shift.stride(0),
            "eps": eps,
        },
        {"D": dim, "BLOCK": block},
        num_warps=num_warps,
    )
    return out


@_op.register_fake
def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype)


OP = register(Op("norm_modulate", reference, cost, run_kernel))
