# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.norm_modulate`: one program per token, one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens_per_row"])
def kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    tokens_per_row,
    row_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute out[s] = LN(x[s]) * (1 + scale[r]) + shift[r], r = s // tokens_per_row."""
    program = tl.program_id(0)
    token = program.to(tl.int64)  # int64: the bytes before a token pass 2^31 at 4K
    column = tl.arange(0, BLOCK)
    inside = column < D
    stored = tl.load(x_ptr + token * D + column, mask=inside, other=0.0)
    x = stored.to(tl.float32)
    mean = tl.sum(x, axis=0) / D
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / D
    normed = centred * (1.0 / tl.sqrt(variance + eps))
    normed = normed.to(stored.dtype).to(tl.float32)  # as WanLayerNorm rounds
    row = (program // tokens_per_row).to(tl.int64) * row_stride
    scale = tl.load(scale_ptr + row + column, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + row + column, mask=inside, other=0.0)
    result = normed * (1.0 + scale) + shift
    tl.store(out_ptr + token * D + column, result.to(out_ptr.dtype.element_ty), mask=inside)
