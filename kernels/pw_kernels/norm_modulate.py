# SPDX-License-Identifier: Apache-2.0
"""LayerNorm without parameters, scaled and shifted by the timestep."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype).float()
    rows = normed.unflatten(0, (shift.shape[0], -1))  # [R, S/R, D]
    return (rows * (1 + scale[:, None]) + shift[:, None]).flatten(0, 1).to(out_dtype)
