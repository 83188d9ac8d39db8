# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `pw_kernels.guided_update`: one pass over the latent."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def update(x, m, new, old, keep, data, slope, new_weight, old_weight, inverse_r):
    """Apply the formula of `pw_kernels.Update`, in the reference's order."""
    correction = old_weight * ((old - m) * inverse_r) + new_weight * (new - m)
    return keep * x + data * m + slope * correction


@triton.jit
def kernel(
    cond_ptr,
    uncond_ptr,
    x_ptr,
    base_ptr,
    before_ptr,
    earlier_ptr,
    next_ptr,
    corrected_ptr,
    prediction_ptr,
    numel,
    guidance,
    sigma,
    correct_keep,
    correct_data,
    correct_slope,
    correct_new,
    correct_old,
    correct_inverse_r,
    keep,
    data,
    slope,
    old_weight,
    inverse_r,
    BLOCK: tl.constexpr,
):
    """Compute one step; an unused term has weight 0, and its tensor is any of the others."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inside = offset < numel - start
    cond = tl.load(cond_ptr + start + offset, mask=inside, other=0.0)
    uncond = tl.load(uncond_ptr + start + offset, mask=inside, other=0.0)
    x = tl.load(x_ptr + start + offset, mask=inside, other=0.0)
    base = tl.load(base_ptr + start + offset, mask=inside, other=0.0)
    before = tl.load(before_ptr + start + offset, mask=inside, other=0.0)
    earlier = tl.load(earlier_ptr + start + offset, mask=inside, other=0.0)
    m = x - sigma * (uncond + guidance * (cond - uncond))
    tl.store(prediction_ptr + start + offset, m, mask=inside)
    base = update(
        base,
        before,
        m,
        earlier,
        correct_keep,
        correct_data,
        correct_slope,
        correct_new,
        correct_old,
        correct_inverse_r,
    )
    tl.store(corrected_ptr + start + offset, base, mask=inside)
    # no prediction is newer than m
    result = update(base, m, m, before, keep, data, slope, 0.0, old_weight, inverse_r)
    tl.store(next_ptr + start + offset, result, mask=inside)
