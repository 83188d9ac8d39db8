# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance."""

from __future__ import annotations

from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """uncond + guidance (cond - uncond), fp32; all of one shape."""
    return uncond + guidance * (cond - uncond)
