# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.gate_residual`: one program per token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens_per_row"])
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
    """Compute out[s] = x[s] + y[s] * gate[r] in fp32, r = s // tokens_per_row."""
    program = tl.program_id(0)
    token = program.to(tl.int64)  # int64: the bytes before a token pass 2^31 at 4K
    row = (program // tokens_per_row).to(tl.int64) * row_stride
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(x_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row + column, mask=inside, other=0.0)
    tl.store(out_ptr + token * D + column, x + y * gate, mask=inside)
