# SPDX-License-Identifier: Apache-2.0
"""From decoder output to bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def unpatchify_pixels(x: Tensor) -> Tensor:
    """Spread 2x2 pixel blocks: channel (c*2 + column)*2 + row goes to (row, column).

    The column offset stands before the row offset, unlike the usual pixel shuffle.

    Args:
        x: [B, 4c, F, H, W].

    Returns:
        [B, c, F, 2H, 2W].
    """
    x = x.unflatten(1, (-1, 2, 2))  # [B, c, column, row, F, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def pack_frames(video: Tensor, *, truncate: bool) -> Tensor:
    """Turn [-1, 1] values into 8-bit RGB.

    Args:
        video: [3, F, height, width] fp32.
        truncate: cut the fraction off as the official code does, instead of rounding.

    Returns:
        [F, height, width, 3] uint8, contiguous.
    """
    scaled = ((video + 1) / 2 * 255).clamp(0, 255)
    if not truncate:
        scaled = scaled.round()
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous()
