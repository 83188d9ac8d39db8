# SPDX-License-Identifier: Apache-2.0
"""The addition that closes a sub-layer and the norm that opens the next one, in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.launcher import launch, row_block
from pw_kernels.norm_modulate import reference as norm_modulate_reference
from pw_kernels.op import FLOATS, Cost, Op, layout, register, require, select
from pw_kernels.variant import Kernel

_KERNEL = Kernel("gate_residual_norm", do_not_specialize=frozenset({"tokens_per_row"}))


def gate_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    *,
    modulated: bool = False,
) -> Tensor:
    """Add y * gate to x in place; return LN(x) * weight + bias, fp32 inside, rounded once.

    Args:
        x: [S, D] fp32 residual stream, overwritten.
        y: [S, D] output of the sub-layer.
        gate: [R, D] fp32; row r serves tokens r*S/R .. (r+1)*S/R. None: y is added unscaled.
        weight: [D] fp32 of the LayerNorm; if `modulated`, [R, D] fp32 scale of the timestep, used
            as 1 + scale.
        bias: [D] fp32 of the LayerNorm; if `modulated`, [R, D] fp32 shift of the timestep.
        eps: added to the variance.
        out_dtype: dtype of the result (the GEMM input).
        modulated: whether weight and bias are scale and shift of the timestep.

    Returns:
        [S, D] in out_dtype.
    """
    triton = select("gate_residual_norm", x.device) == "triton"
    run = torch.ops.pw.gate_residual_norm if triton else reference
    return run(x, y, gate, weight, bias, eps, out_dtype, modulated)


def reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    modulated: bool = False,
) -> Tensor:
    """Oracle of `gate_residual_norm`: the addition, then the norm."""
    if gate is not None:
        y = (y.float().unflatten(0, (gate.shape[0], -1)) * gate[:, None]).flatten(0, 1)
    x.add_(y)
    if modulated:
        return norm_modulate_reference(x, bias, weight, eps, out_dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(out_dtype)


def cost(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    modulated: bool = False,
) -> Cost:
    """Count one read and one write of x, one read of y, one write of the result, and the rows."""
    per_element = 2 * x.element_size() + y.element_size() + out_dtype.itemsize
    rows = weight.numel() + bias.numel() + (0 if gate is None else gate.numel())
    flops = (10 if gate is None else 11) * x.numel()
    return Cost(flops=flops, bytes=x.numel() * per_element + 4 * rows)


def _check(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, modulated: bool
) -> None:
    name = "gate_residual_norm"
    require(x.dim() == 2 and x.is_contiguous(), name, "x contiguous [S, D]", layout(x))
    require(x.numel() > 0, name, "at least one token", tuple(x.shape))
    require(x.dtype == torch.float32, name, "x fp32, to be overwritten", x.dtype)
    require(y.shape == x.shape, name, f"y of x's shape {tuple(x.shape)}", tuple(y.shape))
    require(y.is_contiguous(), name, "y contiguous [S, D]", layout(y))
    require(y.dtype in FLOATS, name, "y fp32, bf16 or fp16", y.dtype)
    tokens, dim = x.shape
    rows = [] if gate is None else [gate]
    if modulated:
        rows += [weight, bias]
    else:
        for vector in (weight, bias):
            expected = f"weight and bias of shape ({dim},) unless modulated"
            require(vector.shape == (dim,), name, expected, tuple(vector.shape))
    for row in rows:
        expected = f"rows [R, {dim}] with R dividing the {tokens} tokens"
        fits = row.dim() == 2 and row.shape[1] == dim and row.shape[0] > 0
        require(fits and tokens % row.shape[0] == 0, name, expected, tuple(row.shape))
        expected = f"all rows of one shape {tuple(rows[0].shape)}"
        require(row.shape == rows[0].shape, name, expected, tuple(row.shape))
    for row in (*rows, weight, bias):
        require(row.dtype == torch.float32, name, "gate, weight and bias in fp32", row.dtype)
        require(row.stride(-1) == 1, name, "gate, weight and bias contiguous along D", layout(row))
    for other in (y, *rows, weight, bias):
        require(other.device == x.device, name, f"all tensors on {x.device}", other.device)


_op = torch.library.custom_op("pw::gate_residual_norm", reference, mutates_args=("x",))
_op.register_fake(reference)


@_op.register_kernel("cuda")
def run_kernel(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    modulated: bool = False,
) -> Tensor:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    _check(x, y, gate, weight, bias, modulated)
    tokens, dim = x.shape
    if weight.stride() != bias.stride():  # rows are usually views into one modulation tensor
        weight, bias = weight.contiguous(), bias.contiguous()
    rows = weight.shape[0] if modulated else 1 if gate is None else gate.shape[0]
    out = torch.empty_like(x, dtype=out_dtype)
    block, num_warps = row_block(dim)
    launch(
        _KERNEL,
        (tokens,),
        {
            "x_ptr": x,
            "y_ptr": y,
            "gate_ptr": x if gate is None else gate,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "out_ptr": out,
            "tokens_per_row": tokens // rows,
            "gate_stride": 0 if gate is None else gate.stride(0),
            "norm_stride": weight.stride(0) if modulated else 0,
            "eps": eps,
        },
        {"GATED": gate is not None, "MODULATED": modulated, "D": dim, "BLOCK": block},
        num_warps=num_warps,
    )
    return out


OP = register(Op("gate_residual_norm", reference, cost, run_kernel))
