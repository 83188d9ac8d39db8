# SPDX-License-Identifier: Apache-2.0
"""A 3-D convolution that sees the past and never the future."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.op import Cost, Op, register, require

LARGEST = 2**31 - 1
"""Elements that the input and the result of one library call may have.

cuDNN counts elements in 32 bits in its fast paths; at 2K and 4K the decoder goes past that.
"""


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve frames behind their past. Rows and columns are zero-padded to keep their size.

    The past stands in x itself, so that nothing is joined or padded for the convolution: who
    makes the frames writes them behind the kt-1 frames that came before (zeros at the start of a
    clip). A clip cut into chunks then gives the same result as the whole clip.

    Args:
        x: [B, C, kt-1+T, H, W], the past and the next frames.
        weight: [C', C, kt, kh, kw], odd kh and kw.
        bias: [C'] or None.

    Returns:
        [B, C', T, H, W]. Where it or x has more than LARGEST elements, it is made in slices of
        frames, or of rows where one frame is too large by itself.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.
    """
    _check(x, weight, bias)
    frames, rows = slice_sizes(x.shape, weight.shape, LARGEST)
    if frames == x.shape[2] - weight.shape[2] + 1 and rows == x.shape[3]:
        return reference(x, weight, bias)
    return _in_slices(x, weight, bias, frames, rows)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The oracle of `causal_conv3d`: one call."""
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    return F.conv3d(x, weight, bias, padding=padding)


def cost(x: Tensor, weight: Tensor, bias: Tensor | None) -> Cost:
    """Every tap of every result; x, weight and bias read once, the result written once."""
    frames = x.shape[2] - weight.shape[2] + 1
    results = x.shape[0] * weight.shape[0] * frames * x.shape[3] * x.shape[4]
    flops = results * (2 * weight[0].numel() + (bias is not None))
    moved = x.numel() + weight.numel() + results + (0 if bias is None else bias.numel())
    return Cost(flops=flops, bytes=moved * x.element_size())


def slice_sizes(x: tuple[int, ...], weight: tuple[int, ...], largest: int) -> tuple[int, int]:
    """Frames and rows of the result that one call may make; less than all rows of one frame only.

    Args:
        x, weight: the shapes of `causal_conv3d`'s arguments.
        largest: elements that a call's input and its result may have.
    """
    batches, channels, given, rows, columns = x
    history, beside = weight[2] - 1, 2 * (weight[3] // 2)
    row_in, row_out = batches * channels * columns, batches * weight[0] * columns
    frames = min(largest // (row_in * rows) - history, largest // (row_out * rows))
    if frames >= 1:
        return min(frames, given - history), rows
    some = min(largest // (row_in * (1 + history)), largest // row_out) - beside
    require(some >= 1, "causal_conv3d", f"three rows within {largest} elements", x)
    return 1, some


def _in_slices(x: Tensor, weight: Tensor, bias: Tensor | None, frames: int, rows: int) -> Tensor:
    """As `reference`, `frames` frames and `rows` rows of the result at a time."""
    history, beside = weight.shape[2] - 1, weight.shape[3] // 2
    total, height = x.shape[2] - history, x.shape[3]
    order = torch.channels_last_3d if x.stride(1) < x.stride(4) else torch.contiguous_format
    shape = (x.shape[0], weight.shape[0], total, height, x.shape[4])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)
    for start, stop in _pieces(total, frames):
        for top, bottom in _pieces(height, rows):
            # Rows beside the slice are convolved with it and dropped: they see padding.
            first, last = max(0, top - beside), min(height, bottom + beside)
            part = reference(x[:, :, start : stop + history, first:last], weight, bias)
            out[:, :, start:stop, top:bottom] = part[:, :, :, top - first : bottom - first]
    return out


def _pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, total)) for start in range(0, total, size))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    name = "causal_conv3d"
    require(x.dim() == 5, name, "x [B, C, kt-1+T, H, W]", tuple(x.shape))
    wanted = f"weight [C', {x.shape[1]}, kt, kh, kw]"
    fits = weight.dim() == 5 and weight.shape[1] == x.shape[1]
    require(fits, name, wanted, tuple(weight.shape))
    odd = weight.shape[3] % 2 == weight.shape[4] % 2 == 1
    require(odd, name, "odd kh and kw", tuple(weight.shape[3:]))
    require(x.shape[2] >= weight.shape[2], name, f"{weight.shape[2]} frames or more", x.shape[2])
    require(x.numel() > 0, name, "at least one position", tuple(x.shape))
    if bias is not None:
        right = bias.shape == weight.shape[:1]
        require(right, name, f"bias [{weight.shape[0]}]", tuple(bias.shape))
    for tensor in (weight, *(() if bias is None else (bias,))):
        require(tensor.dtype == x.dtype, name, f"one dtype, {x.dtype}", tensor.dtype)
        require(tensor.device == x.device, name, f"all on {x.device}", tensor.device)


OP = register(Op("causal_conv3d", reference, cost))
