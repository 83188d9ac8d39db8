# SPDX-License-Identifier: Apache-2.0
"""LayerNorm without parameters, scaled and shifted by the timestep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.launcher import launch, row_block
from pw_kernels.op import FLOATS, Cost, Op, register, require, select
from pw_kernels.variant import Kernel

_KERNEL = Kernel("norm_modulate", do_not_specialize=frozenset({"tokens_per_row"}))


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Compute LN(x) * (1 + scale) + shift in fp32, rounded once to `out_dtype`.

    The normalised value is first rounded to x's dtype, as in the official WanLayerNorm. This
    matters only in block 0, where x is still the bf16 patch embedding.

    Args:
        x: [S, D] residual stream.
        shift: [R, D] fp32; row r serves tokens r*S/R .. (r+1)*S/R.
        scale: [R, D] fp32.
        eps: added to the variance.
        out_dtype: dtype of the result (the GEMM input).

    Returns:
        [S, D].
    """
    triton = select("norm_modulate", x.device) == "triton"
    run = torch.ops.pw.norm_modulate if triton else reference
    return run(x, shift, scale, eps, out_dtype)


def reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Oracle of `norm_modulate`."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype).float()
    rows = normed.unflatten(0, (shift.shape[0], -1))  # [R, S/R, D]
    return (rows * (1 + scale[:, None]) + shift[:, None]).flatten(0, 1).to(out_dtype)


def cost(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype) -> Cost:
    """Count one read of x, one write of the result, and the (negligible) rows."""
    moved = x.numel() * (x.element_size() + out_dtype.itemsize)
    return Cost(flops=9 * x.numel(), bytes=moved + 2 * shift.numel() * shift.element_size())


def _check(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    name = "norm_modulate"
    require(x.dim() == 2 and x.is_contiguous(), name, "x contiguous [S, D]", tuple(x.shape))
    require(x.numel() > 0, name, "at least one token", tuple(x.shape))
    require(x.dtype in FLOATS, name, "x fp32, bf16 or fp16", x.dtype)
    for row in (shift, scale):
        expected = f"rows [R, {x.shape[1]}] with R dividing the {x.shape[0]} tokens"
        fits = row.dim() == 2 and row.shape[1] == x.shape[1] and row.shape[0] > 0
        require(fits and x.shape[0] % row.shape[0] == 0, name, expected, tuple(row.shape))
        require(row.dtype == torch.float32, name, "fp32 rows", row.dtype)
        require(row.stride(1) == 1, name, "rows contiguous along D", row.stride())
        require(row.device == x.device, name, f"all tensors on {x.device}", row.device)
    require(shift.shape == scale.shape, name, "shift and scale of one shape", tuple(scale.shape))


_op = torch.library.custom_op("pw::norm_modulate", reference, mutates_args=())
_op.register_fake(reference)


@_op.register_kernel("cuda")
def run_kernel(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    _check(x, shift, scale)
    tokens, dim = x.shape
    if scale.stride() != shift.stride():  # rows are usually views into one modulation tensor
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


OP = register(Op("norm_modulate", reference, cost, run_kernel))
