# SPDX-License-Identifier: Apache-2.0
"""A 3-D convolution that sees the past and never the future."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Convolve a chunk of frames, given the frames that came before it.

    Rows and columns are zero-padded to keep their size; time is padded on the left with `past`,
    so a clip cut into chunks gives the same result as the whole clip.

    Args:
        x: [B, C, T, H, W] next frames.
        weight: [C', C, kt, kh, kw], odd kh and kw.
        bias: [C'] or None.
        past: the last kt-1 input frames before x, or None at the start of a clip (zeros).

    Returns:
        ([B, C', T, H, W], the `past` of the next chunk, None where kt is 1).
    """
    history = weight.shape[2] - 1
    if history:
        if past is None:
            past = x.new_zeros((*x.shape[:2], history, *x.shape[3:]))
        x = torch.cat((past, x), dim=2)
        past = x[:, :, -history:].clone()
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    return F.conv3d(x, weight, bias, padding=padding), past
