# SPDX-License-Identifier: Apache-2.0
"""A 3-D convolution that is causal in time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import mkldnn as onednn

from pw_kernels.cpu_library import convolvable, convolve
from pw_kernels.op import Cost, Op, register, require, select

_NAME = "causal_conv3d"
LARGEST = 2**31 - 1
"""Largest number of elements in the input and in the result of one library call.

cuDNN's fast paths index elements with 32 bits; at 2K and 4K the decoder exceeds that.
"""


def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, rows_given: bool = False
) -> Tensor:
    """Convolve frames with those before them. Rows and columns are zero-padded to keep their size.

    x already contains the past, so that nothing is concatenated or padded for the convolution:
    the caller writes new frames behind the kt-1 preceding ones (zeros at the start of a clip). A
    clip processed in chunks then gives the same result as the whole clip.

    Args:
        x: [B, C, kt-1+T, H, W], the past and the next frames.
        weight: [C', C, kt, kh, kw], odd kh and kw.
        bias: [C'] or None.
        rows_given: x already contains the rows above and below those of the result: rows are
            not padded.

    Returns:
        [B, C', T, H, W]; H - kh + 1 rows with rows_given. Where it or x has more than LARGEST
        elements, it is computed in slices of frames, or of rows where a single frame is too large.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    _check(x, weight, bias)
    if rows_given:
        require(x.shape[3] >= weight.shape[3], _NAME, f"{weight.shape[3]} rows or more", x.shape[3])
    frames, rows = slice_sizes(x.shape, weight.shape, LARGEST)
    if frames == x.shape[2] - weight.shape[2] + 1 and rows == x.shape[3]:
        return _call(x, weight, bias, rows_given)
    return _in_slices(x, weight, bias, rows_given, frames, rows)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, rows_given: bool = False) -> Tensor:
    """Oracle of `causal_conv3d`: one call."""
    return F.conv3d(x, weight, bias, padding=_padding(weight, rows_given))


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, rows_given: bool) -> Tensor:
    """Compute `reference`, on a CPU with oneDNN whatever the size; by Winograd as "cpu".

    PyTorch uses oneDNN for a 3-D convolution only where channels x frames x rows exceed 20480;
    its own code is four times as slow and copies its input for every tap.
    """
    if select(_NAME, x.device) == "cpu" and convolvable(x, weight, bias, rows_given):
        return convolve(x, weight, bias, rows_given)
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or not onednn.is_available()
    if plain or type(x) is not Tensor or torch.compiler.is_compiling():
        return reference(x, weight, bias, rows_given)
    ones = (1, 1, 1)
    return torch.mkldnn_convolution(x, weight, bias, _padding(weight, rows_given), ones, ones, 1)


def _padding(weight: Tensor, rows_given: bool) -> tuple[int, int, int]:
    return 0, 0 if rows_given else weight.shape[3] // 2, weight.shape[4] // 2


def cost(x: Tensor, weight: Tensor, bias: Tensor | None, rows_given: bool = False) -> Cost:
    """Count every tap of every result; x, weight and bias read once, the result written once."""
    frames = x.shape[2] - weight.shape[2] + 1
    rows = x.shape[3] - rows_given * (weight.shape[3] - 1)
    results = x.shape[0] * weight.shape[0] * frames * rows * x.shape[4]
    flops = results * (2 * weight[0].numel() + (bias is not None))
    moved = x.numel() + weight.numel() + results + (0 if bias is None else bias.numel())
    return Cost(flops=flops, bytes=moved * x.element_size())


def slice_sizes(x: tuple[int, ...], weight: tuple[int, ...], largest: int) -> tuple[int, int]:
    """Return how many frames and rows of the result one call may compute.

    Several frames of all rows; where a single frame is too large, some rows of one.

    Args:
        x, weight: shapes of `causal_conv3d`'s arguments.
        largest: limit for the elements of a call's input and of its result.
    """
    batches, channels, frames_given, rows, columns = x
    history, beside = weight[2] - 1, 2 * (weight[3] // 2)
    row_in, row_out = batches * channels * columns, batches * weight[0] * columns
    frames = min(largest // (row_in * rows) - history, largest // (row_out * rows))
    if frames >= 1:
        return min(frames, frames_given - history), rows
    slice_rows = min(largest // (row_in * (1 + history)), largest // row_out) - beside
    require(slice_rows >= 1, _NAME, f"three rows within {largest} elements", x)
    return 1, slice_rows


def _in_slices(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows_given: bool, frames: int, rows: int
) -> Tensor:
    """Compute `reference`, `frames` frames and `rows` rows of the result at a time."""
    history, beside = weight.shape[2] - 1, weight.shape[3] // 2
    above = beside if rows_given else 0  # rows of x before the result's first row
    total, height = x.shape[2] - history, x.shape[3] - 2 * above
    order = torch.channels_last_3d if x.stride(1) < x.stride(4) else torch.contiguous_format
    shape = (x.shape[0], weight.shape[0], total, height, x.shape[4])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)
    for start, stop in _pieces(total, frames):
        for top, bottom in _pieces(height, rows):
            source = x[:, :, start : stop + history]
            if rows_given:
                part = _call(source[:, :, :, top : bottom + 2 * above], weight, bias, True)
            else:
                # Neighbouring rows are convolved too and dropped, as they see padding.
                first, last = max(0, top - beside), min(height, bottom + beside)
                part = _call(source[:, :, :, first:last], weight, bias, False)
                part = part[:, :, :, top - first : bottom - first]
            out[:, :, start:stop, top:bottom] = part
            del part  # before the next one is allocated
    return out


def _pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, total)) for start in range(0, total, size))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require(x.dim() == 5, _NAME, "x [B, C, kt-1+T, H, W]", tuple(x.shape))
    expected = f"weight [C', {x.shape[1]}, kt, kh, kw]"
    fits = weight.dim() == 5 and weight.shape[1] == x.shape[1]
    require(fits, _NAME, expected, tuple(weight.shape))
    odd = weight.shape[3] % 2 == weight.shape[4] % 2 == 1
    require(odd, _NAME, "odd kh and kw", tuple(weight.shape[3:]))
    require(x.shape[2] >= weight.shape[2], _NAME, f"{weight.shape[2]} frames or more", x.shape[2])
    require(x.numel() > 0, _NAME, "at least one position", tuple(x.shape))
    if bias is not None:
        fits = bias.shape == weight.shape[:1]
        require(fits, _NAME, f"bias [{weight.shape[0]}]", tuple(bias.shape))
    for tensor in (weight, *(() if bias is None else (bias,))):
        require(tensor.dtype == x.dtype, _NAME, f"one dtype, {x.dtype}", tensor.dtype)
        require(tensor.device == x.device, _NAME, f"all on {x.device}", tensor.device)


OP = register(Op(_NAME, reference, cost, libraries=("cpu",)))
