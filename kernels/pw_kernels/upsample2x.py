# SPDX-License-Identifier: Apache-2.0
"""Nearest-neighbour doubling and a 3x3 convolution, without the doubled tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.op import Cost, Op, register, require


def upsample2x_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv3x3(nearest x2 of x), zero-padded by 1, as four 2x2 convolutions of x itself.

    Of the three taps along an axis, two fall on the same element of x: the even results see
    x[i-1] w0 + x[i] (w1 + w2), the odd ones x[i] (w0 + w1) + x[i+1] w2. Exact but for rounding,
    with 4/9 of the multiplications.

    Args:
        x: [B, C, H, W].
        weight: [C', C, 3, 3].
        bias: [C'] or None.

    Returns:
        [B, C', 2H, 2W], channels last in memory where the convolution leaves them so.
    """
    shape = tuple(weight.shape)
    require(shape[1:] == (x.shape[1], 3, 3), "upsample2x_conv", "weight [C', C, 3, 3]", shape)
    height, width = x.shape[2:]
    channels_last = weight.stride(1) < weight.stride(3)
    order = torch.channels_last if channels_last else torch.contiguous_format
    out: Tensor | None = None
    for row, rows in enumerate(_phases(weight, 2)):
        for column, taps in enumerate(_phases(rows, 3)):
            # Padded by the convolution on all sides and cropped: no padded copy of x.
            part = F.conv2d(x, taps.contiguous(memory_format=order), bias, padding=1)
            part = part[:, :, row : row + height, column : column + width]
            if out is None:
                out = _doubled(part)
            out[:, :, row::2, column::2] = part
    assert out is not None
    return out


def cost(x: Tensor, weight: Tensor, bias: Tensor | None) -> Cost:
    """Four taps a result; x, weight and bias read once, the result written once."""
    results = x.shape[0] * weight.shape[0] * 4 * x.shape[2] * x.shape[3]
    flops = results * (2 * 4 * weight.shape[1] + (bias is not None))
    moved = x.numel() + weight.numel() + results + (0 if bias is None else bias.numel())
    return Cost(flops=flops, bytes=moved * x.element_size())


def _phases(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two taps of even and of odd results along `dim`."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)


def _doubled(part: Tensor) -> Tensor:
    """An empty picture of twice the rows and columns, ordered in memory as `part` is."""
    b, c, h, w = part.shape
    channels_last = part.stride(1) < part.stride(3)
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (b, c, 2 * h, 2 * w), dtype=part.dtype, device=part.device, memory_format=order
    )


OP = register(Op("upsample2x_conv", upsample2x_conv, cost, others=()))
