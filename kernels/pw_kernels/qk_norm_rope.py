# SPDX-License-Identifier: Apache-2.0
"""What happens to queries and keys before attention: RMS norm over all heads, then rotation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension.

    fp32 inside; rounded to x's dtype before and after the gain (official WanRMSNorm).

    Args:
        x: [..., D].
        gain: [D], in x's dtype.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * gain


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved channel pairs (2j, 2j+1) by the angles of each token.

    Args:
        x: [S, N, K].
        cos: [S, K/2] fp32.
        sin: [S, K/2] fp32.

    Returns:
        [S, N, K] in x's dtype, computed in fp32.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [S, N, K/2]
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
