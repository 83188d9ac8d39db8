# SPDX-License-Identifier: Apache-2.0
"""The VAE's RMS norm over channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def channel_norm(x: Tensor, gamma: Tensor, *, silu: bool) -> Tensor:
    """x / max(|x|_2, 1e-12) * sqrt(C) * gamma over dimension 1, then SiLU where asked.

    Not the eps-inside form of an ordinary RMS norm (official RMS_norm of vae2_2.py).

    Args:
        x: [B, C, ...].
        gamma: [C, 1, ...], broadcastable to x.
        silu: apply SiLU to the result.

    Returns:
        Same shape and dtype as x.
    """
    normed = F.normalize(x, dim=1).mul_(x.shape[1] ** 0.5).mul_(gamma)
    return F.silu(normed, inplace=True) if silu else normed
