# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.gate_residual`: one program per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pw_kernels._triton.row_block import row_block


@triton.jit
def kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    out_ptr,
    tokens_per_row,
    row_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[s] = x[s] + y[s] * gate[r] in fp32, r = s // tokens_per_row."""
    program = tl.program_id(0)
    token = program.to(tl.int64)  # int64: the bytes before a token pass 2^31 at 4K
    row = (program // tokens_per_row).to(tl.int64) * row_stride
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(x_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row + column, mask=inside, other=0.0)
    tl.store(out_ptr + token * D + column, x + y * gate, mask=inside)


def launch(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Run the kernel; the input was checked by the caller."""
    tokens, dim = x.shape
    out = torch.empty_like(x, dtype=torch.float32)
    block, num_warps = row_block(dim)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever x is on
        kernel[(tokens,)](
            x,
            y,
            gate,
            out,
            tokens // gate.shape[0],
            gate.stride(0),
            D=dim,
            BLOCK=block,
            num_warps=num_warps,
        )
    return out
