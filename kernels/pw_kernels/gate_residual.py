# SPDX-License-Identifier: Apache-2.0
"""The gated addition that closes a sub-layer."""

from __future__ import annotations

import torch
from torch import Tensor

from pw_kernels.launcher import launch, row_block
from pw_kernels.op import FLOATS, Cost, Op, layout, register, require, select
from pw_kernels.variant import Kernel

_KERNEL = Kernel("gate_residual", do_not_specialize=frozenset({"tokens_per_row"}))


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Compute x + y * gate in fp32.

    Args:
        x: [S, D] residual stream, any float dtype.
        y: [S, D] output of the sub-layer.
        gate: [R, D] fp32; row r serves tokens r*S/R .. (r+1)*S/R.

    Returns:
        [S, D] fp32: the residual stream is fp32 from the first gated addition on.
    """
    triton = select("gate_residual", x.device) == "triton"
    run = torch.ops.pw.gate_residual if triton else reference
    return run(x, y, gate)


def reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Oracle of `gate_residual`."""
    rows = y.float().unflatten(0, (gate.shape[0], -1)) * gate[:, None]  # [R, S/R, D]
    return x + rows.flatten(0, 1)


def cost(x: Tensor, y: Tensor, gate: Tensor) -> Cost:
    """Count one read of x and y, one write of the fp32 result, and the (negligible) rows."""
    moved = x.numel() * (x.element_size() + y.element_size() + 4)
    return Cost(flops=2 * x.numel(), bytes=moved + gate.numel() * gate.element_size())


def _check(x: Tensor, y: Tensor, gate: Tensor) -> None:
    name = "gate_residual"
    require(x.dim() == 2 and x.is_contiguous(), name, "x contiguous [S, D]", layout(x))
    require(y.shape == x.shape, name, f"y of x's shape {tuple(x.shape)}", tuple(y.shape))
    require(y.is_contiguous(), name, "y contiguous [S, D]", layout(y))
    require(x.numel() > 0, name, "at least one token", tuple(x.shape))
    require(x.dtype in FLOATS, name, "x fp32, bf16 or fp16", x.dtype)
    require(y.dtype in FLOATS, name, "y fp32, bf16 or fp16", y.dtype)
    expected = f"a gate [R, {x.shape[1]}]"
    require(gate.dim() == 2 and gate.shape[1] == x.shape[1], name, expected, tuple(gate.shape))
    divides = gate.shape[0] > 0 and x.shape[0] % gate.shape[0] == 0
    require(divides, name, f"R to divide the {x.shape[0]} tokens", tuple(gate.shape))
    require(gate.dtype == torch.float32, name, "an fp32 gate", gate.dtype)
    require(gate.stride(1) == 1, name, "a gate contiguous along D", layout(gate))
    for other in (y, gate):
        require(other.device == x.device, name, f"all tensors on {x.device}", other.device)


_op = torch.library.custom_op("pw::gate_residual", reference, mutates_args=())
_op.register_fake(reference)


@_op.register_kernel("cuda")
def run_kernel(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    _check(x, y, gate)
    tokens, dim = x.shape
    out = torch.empty_like(x, dtype=torch.float32)
    block, num_warps = row_block(dim)
    launch(
        _KERNEL,
        (tokens,),
        {
            "x_ptr": x,
            "y_ptr": y,
            "gate_ptr": gate,
            "out_ptr": out,
            "tokens_per_row": tokens // gate.shape[0],
            "row_stride": gate.stride(0),
        },
        {"D": dim, "BLOCK": block},
        num_warps=num_warps,
    )
    return out


OP = register(Op("gate_residual", reference, cost, run_kernel))
