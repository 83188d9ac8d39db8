# SPDX-License-Identifier: Apache-2.0
"""Nearest-neighbour doubling and a 3x3 convolution, without the doubled tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.op import Cost, Op, register, require


def upsample2x_conv(
    x: Tensor, taps: Tensor, bias: Tensor | None, *, above: int = 0, below: int = 0
) -> Tensor:
    """Compute conv3x3(nearest x2 of x), zero-padded by 1, as four 2x2 convolutions of x itself.

    Of the three taps along an axis, two fall on the same element of x: even results are
    x[i-1] w0 + x[i] (w1 + w2), odd ones x[i] (w0 + w1) + x[i+1] w2. Exact up to rounding, with
    4/9 of the multiplications.

    Args:
        x: [B, C, H, W].
        taps: [4, C', C, 2, 2] from `phase_taps`.
        bias: [C'] or None.
        above, below: halo rows of x at its top and bottom; the result has no rows of theirs.

    Returns:
        [B, C', 2 (H - above - below), 2W], channels last in memory where the convolution's
        result is.

    Raises:
        ValueError: taps of another shape.
    """
    shape = tuple(taps.shape)
    fits = taps.dim() == 5 and (shape[0], *shape[2:]) == (4, x.shape[1], 2, 2)
    require(fits, "upsample2x_conv", f"taps [4, C', {x.shape[1]}, 2, 2]", shape)
    height, width = x.shape[2] - above - below, x.shape[3]
    require(height > 0, "upsample2x_conv", "a row besides the halo", x.shape[2])
    out: Tensor | None = None
    for phase in range(4):
        row, column = divmod(phase, 2)
        # Padded by the convolution on all sides and cropped: no padded copy of x.
        part = F.conv2d(x, taps[phase], bias, padding=1)
        part = part[:, :, above + row : above + row + height, column : column + width]
        if out is None:
            out = _doubled(part)
        out[:, :, row::2, column::2] = part
        del part  # before the next one is allocated
    assert out is not None
    return out


def phase_taps(weight: Tensor) -> Tensor:
    """Compute the weights of the four convolutions; a network does it once.

    Args:
        weight: [C', C, 3, 3] of the convolution after the doubling.

    Returns:
        [4, C', C, 2, 2] for even rows' even and odd columns, odd rows' even and odd columns;
        each of the four in the memory format of `weight`.

    Raises:
        ValueError: a weight of another shape.
    """
    require(weight.shape[2:] == (3, 3), "upsample2x_conv", "weight [C', C, 3, 3]", weight.shape)
    phases = [taps for rows in _halves(weight, 2) for taps in _halves(rows, 3)]
    if weight.stride(1) < weight.stride(3):
        phases = [taps.movedim(1, 3) for taps in phases]  # [C', 2, 2, C]
        return torch.stack(phases).movedim(4, 2)
    return torch.stack(phases)


def cost(x: Tensor, taps: Tensor, bias: Tensor | None, above: int = 0, below: int = 0) -> Cost:
    """Count four taps per result; x, taps and bias read once, the result written once."""
    results = x.shape[0] * taps.shape[1] * 4 * (x.shape[2] - above - below) * x.shape[3]
    flops = results * (2 * 4 * taps.shape[2] + (bias is not None))
    moved = x.numel() + taps.numel() + results + (0 if bias is None else bias.numel())
    return Cost(flops=flops, bytes=moved * x.element_size())


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the two taps of even and of odd results along `dim`."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)


def _doubled(part: Tensor) -> Tensor:
    """Allocate twice the rows and columns of `part` in its memory format."""
    b, c, h, w = part.shape
    channels_last = part.stride(1) < part.stride(3)
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        (b, c, 2 * h, 2 * w), dtype=part.dtype, device=part.device, memory_format=order
    )


OP = register(Op("upsample2x_conv", upsample2x_conv, cost))
