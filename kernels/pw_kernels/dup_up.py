# SPDX-License-Identifier: Apache-2.0
"""The parameterless shortcut around an upsampling stage of the VAE decoder."""

from __future__ import annotations

from torch import Tensor


def dup_up(x: Tensor, channels: int, time_factor: int, space_factor: int, *, first: bool) -> Tensor:
    """Spread channels over a finer grid by duplication (official DupUp3D).

    Channel o at sub-position (a, b, c) copies input channel
    (((o ft + a) fs + b) fs + c) // r, with r = channels ft fs^2 / C repeats.

    Args:
        x: [B, C, T, H, W].
        channels: channels of the result.
        time_factor: ft, frames made of one frame.
        space_factor: fs, rows made of one row and columns made of one column.
        first: x starts a clip; its first ft-1 result frames are dropped.

    Returns:
        [B, channels, T ft (- (ft-1) when first), H fs, W fs].
    """
    ft, fs = time_factor, space_factor
    repeats = channels * ft * fs * fs // x.shape[1]
    # Repeats by strides alone wherever r spans whole sub-positions, as in every Wan2.2 decoder.
    x = x.unsqueeze(2).expand(-1, -1, repeats, -1, -1, -1)
    x = x.reshape(x.shape[0], channels, ft, fs, fs, *x.shape[3:])
    # [B, C', ft, fs, fs, T, H, W] -> [B, C', T, ft, H, fs, W, fs]
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return x[:, :, ft - 1 :] if first else x
