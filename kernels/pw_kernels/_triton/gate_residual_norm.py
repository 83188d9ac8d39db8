# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.gate_residual_norm`: one program per token, one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens_per_row"])
def kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    tokens_per_row,
    gate_stride,
    norm_stride,
    eps,
    GATED: tl.constexpr,
    MODULATED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute x[s] += y[s] * gate[r] and out[s] = LN(x[s]) * weight[r] + bias[r].

    r = s // tokens_per_row. Unless GATED, gate is 1 and gate_ptr is not read. If MODULATED, 1 is
    added to weight.
    """
    program = tl.program_id(0)
    token = program.to(tl.int64)  # int64: the bytes before a token pass 2^31 at 4K
    row = (program // tokens_per_row).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(x_ptr + token * D + column, mask=inside, other=0.0)
    y = tl.load(y_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        y *= tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0)
    x += y
    tl.store(x_ptr + token * D + column, x, mask=inside)
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / D
    normed = centred * (1.0 / tl.sqrt(variance + eps))
    weight = tl.load(weight_ptr + row * norm_stride + column, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + row * norm_stride + column, mask=inside, other=0.0)
    if MODULATED:
        weight += 1.0
    result = normed * weight + bias
    tl.store(out_ptr + token * D + column, result.to(out_ptr.dtype.element_ty), mask=inside)
