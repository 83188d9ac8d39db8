# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose operands have 8 or 4 bits.

Both operands are treated alike: each row (a token of x, an output channel of the weight) is divided
by its range, so that its largest magnitude is `unit * largest` of the format, and rounded to
multiples of constants. The product is one of small numbers, and the ranges are multiplied to it:

    y = product(quantized(x / x_range), weight) * x_range * scale + bias

A compiler sees a scale that is known when it builds (the power of two `unit`, so that dequantized
values are exact in bf16), which it needs for a product of integers; the ranges of tokens are still
those of the data. docs/engines.md has what was tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.op import Cost, Op, register, require

NumberFormat = Literal["int8", "int8-weight", "fp8", "nvfp4"]


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that a format has.

    Attributes:
        dtype: of the stored operand; nvfp4 has two numbers in an element.
        unit: a power of two; a stored number q stands for q * unit.
        largest: magnitude of a stored number, with its block's scale.
        quantizes_input: x is quantized too; else it has the dtype of the result.
    """

    dtype: torch.dtype
    unit: float
    largest: float
    quantizes_input: bool = True

    @property
    def top(self) -> float:
        """Largest magnitude of a row that was divided by its range."""
        return self.unit * self.largest


E4M3: Final = 448.0  # the largest magnitude in fp8
E2M1: Final = 6.0  # likewise in fp4
BLOCK: Final = 16  # numbers that share a scale in nvfp4
GRIDS: Final[Mapping[NumberFormat, Grid]] = MappingProxyType(
    {
        "int8": Grid(torch.int8, 2.0**-7, 127.0),
        "int8-weight": Grid(torch.int8, 2.0**-7, 127.0, quantizes_input=False),
        "fp8": Grid(torch.float8_e4m3fn, 2.0**-9, E4M3),
        "nvfp4": Grid(torch.float4_e2m1fn_x2, 2.0**-12, E2M1 * E4M3),
    }
)
# Range of a row of zeros, and of what is nearly that: its quotients are finite, and zero or tiny.
_LEAST_RANGE: Final = 1e-30
# Integers of magnitude up to 2^24 are exact in fp32, and so is every sum of so many products.
_EXACT_TERMS: Final = 2**24 // 127**2


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    blocks: Tensor | None,
    number_format: NumberFormat,
) -> Tensor:
    """Compute x @ weight.T + bias with quantized operands.

    Args:
        x: [S, K], any float dtype.
        weight: [N, K] quantized by `quantize_rows`, in nvfp4 [N, K/2].
        scale: [N] fp32, the ranges of its rows.
        bias: [N] fp32 or bf16.
        blocks: [N, K/16] fp8 scales of its blocks, for nvfp4 only.
        number_format: of the weight.

    Returns:
        [S, N] in the dtype of the bias. A row of x that is not finite gives one that is not.

    Raises:
        ValueError: a weight or scales of another dtype than the format has.
    """
    expected = GRIDS[number_format].dtype
    name = "quantized_linear"
    require(weight.dtype == expected, name, f"{number_format} weights as {expected}", weight.dtype)
    require(
        (blocks is not None) == (number_format == "nvfp4"),
        name,
        "scales of blocks for nvfp4, and only there",
        None if blocks is None else tuple(blocks.shape),
    )
    return reference(x, weight, scale, bias, blocks, number_format)


def reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    blocks: Tensor | None,
    number_format: NumberFormat,
) -> Tensor:
    """Oracle of `quantized_linear`."""
    low = bias.dtype == torch.bfloat16
    if GRIDS[number_format].quantizes_input:
        x_range = row_range(x, number_format)  # [S, 1]
        x = x.float() / x_range
        if number_format == "nvfp4":
            x = x.to(bias.dtype)  # TensorRT would store it in fp32
        y = product(x, weight, blocks, number_format, low=low).float()
        y *= x_range
    else:
        y = product(x.to(bias.dtype), weight, blocks, number_format, low=low).float()
    y *= scale
    y += bias
    return y.to(bias.dtype)


def cost(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    blocks: Tensor | None,
    number_format: NumberFormat,
) -> Cost:
    """Count one read of x and the weight, one write of the result."""
    tokens, width, channels = *x.shape, weight.shape[0]
    moved = sum(t.numel() * t.element_size() for t in (x, weight, scale, bias))
    if blocks is not None:
        moved += blocks.numel()
    moved += tokens * channels * bias.element_size()
    return Cost(flops=2 * tokens * width * channels, bytes=moved)


def row_range(x: Tensor, number_format: NumberFormat) -> Tensor:
    """Return what the rows of x are divided by before they are quantized, [S, K] -> [S, 1] fp32."""
    largest = x.abs().amax(-1, keepdim=True).float().clamp_min(_LEAST_RANGE)
    return largest / GRIDS[number_format].top


def quantize_rows(x: Tensor, number_format: NumberFormat) -> tuple[Tensor, Tensor | None, Tensor]:
    """Quantize a matrix by rows: a weight by its output channels.

    Args:
        x: [N, K] of finite numbers, any float dtype; K a multiple of 16 for nvfp4.
        number_format: to quantize to.

    Returns:
        The numbers, [N, K] or [N, K/2]; scales of blocks, [N, K/16] fp8, for nvfp4; the ranges of
        the rows, [N] fp32.
    """
    x_range = row_range(x, number_format)
    numbers, blocks = _rounded(x.float() / x_range, number_format)
    return numbers, blocks, x_range[:, 0]


def dequantized(
    numbers: Tensor, blocks: Tensor | None, number_format: NumberFormat, dtype: torch.dtype
) -> Tensor:
    """Return what quantized rows stand for beside their ranges, [N, K]: exact in bf16 and fp32."""
    unit = GRIDS[number_format].unit
    if blocks is None:
        return numbers.to(dtype) * unit
    return _unpacked(numbers, dtype) * _over_blocks(blocks.to(dtype) * unit)


def _product(
    x: Tensor, weight: Tensor, blocks: Tensor | None, number_format: str, low: bool
) -> Tensor:
    """Multiply rows that were divided by their ranges with a quantized weight.

    An operator of its own, so that an export sees it as one. It quantizes x, if the format does.
    The sum is exact for int8, and in fp32 for the others.

    Args:
        x: [S, K] fp32, for int8-weight and nvfp4 in the dtype of the result.
        weight: [N, K], or [N, K/2] for nvfp4.
        blocks: [N, K/16] for nvfp4.
        number_format: of both operands, or of the weight.
        low: return bf16, else fp32.

    Returns:
        [S, N].
    """
    name: NumberFormat = number_format  # type: ignore[assignment]
    dtype = torch.bfloat16 if low else torch.float32
    if name == "int8":
        unit = GRIDS[name].unit
        return (_integer_product(_rounded(x, name)[0], weight) * unit**2).to(dtype)
    if GRIDS[name].quantizes_input:
        x = dequantized(*_rounded(x, name), name, dtype)
    return F.linear(x.to(dtype), dequantized(weight, blocks, name, dtype))


def has_integer_products() -> bool:
    """Tell whether this CPU multiplies int8 in hardware (VNNI); without, fp32 is 20 times as fast.

    Both ways give the same sums.
    """
    return bool(torch.cpu._is_vnni_supported())


def _integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply int8 matrices [S, K] and [N, K]: the exact sums, [S, N] fp32.

    A CPU without instructions for them computes in fp32, in parts whose every partial sum is exact,
    whatever its order. A sum is rounded once, if it is beyond 2^24.
    """
    if x.device.type == "cpu" and has_integer_products():
        return torch._int_mm(x, weight.t()).float()
    if x.device.type == "cuda":
        rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, max(0, 17 - rows)))  # fewer rows are refused
        return torch._int_mm(padded, weight.t())[:rows].float()
    total: Tensor | None = None
    for a, b in zip(x.split(_EXACT_TERMS, 1), weight.split(_EXACT_TERMS, 1), strict=True):
        part = F.linear(a.float(), b.float())
        if x.shape[1] <= _EXACT_TERMS:
            return part
        total = part.int() if total is None else total.add_(part.int())
    assert total is not None, "a matrix without columns"
    return total.float()


def _rounded(x: Tensor, number_format: NumberFormat) -> tuple[Tensor, Tensor | None]:
    """Round rows that were divided by their ranges; for nvfp4 also choose scales of blocks."""
    grid = GRIDS[number_format]
    if grid.dtype == torch.int8:
        return (x / grid.unit).round_().clamp_(-127, 127).to(torch.int8), None
    if grid.dtype == torch.float8_e4m3fn:
        return (x / grid.unit).clamp_(-E4M3, E4M3).to(grid.dtype), None
    largest = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1)  # [S, K/16]
    blocks = (largest / (E2M1 * grid.unit)).clamp_max(E4M3).to(torch.float8_e4m3fn)
    # The scale of a block so small that it rounds to zero makes its numbers zero.
    scale = _over_blocks(blocks.float() * grid.unit)
    numbers = torch.where(scale > 0, x / scale.clamp_min(_LEAST_RANGE), 0.0)
    return _packed(_round_to_e2m1(numbers)), blocks


def _over_blocks(scale: Tensor) -> Tensor:
    """Repeat scales for the numbers of their blocks, [N, K/16] -> [N, K]."""
    return scale.repeat_interleave(BLOCK, dim=-1)


def _round_to_e2m1(x: Tensor) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to the even one."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (torch.round(x / step) * step).clamp(-E2M1, E2M1)


def _packed(x: Tensor) -> Tensor:
    """Pack numbers that E2M1 has, [N, K] -> [N, K/2]: the first of two in the low bits."""
    magnitude = x.abs()
    # 0, 0.5, 1, 1.5, 2, 3, 4, 6 have the codes 0 to 7.
    code = torch.where(magnitude <= 2, 2 * magnitude, magnitude + 2).clamp_max(7)
    code = (code + 8 * (x < 0)).to(torch.uint8)
    return (code[:, ::2] | (code[:, 1::2] << 4)).view(torch.float4_e2m1fn_x2)


def _unpacked(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Reverse `_packed`."""
    packed = numbers.view(torch.uint8)
    code = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    low = (code & 7).to(dtype)
    magnitude = torch.where(low <= 4, low / 2, torch.where(low < 7, low - 2, E2M1))
    return torch.where(code < 8, magnitude, -magnitude)


_library = torch.library.Library("pw", "FRAGMENT")
_library.define(
    "quantized_product(Tensor x, Tensor weight, Tensor? blocks, str number_format, bool low)"
    " -> Tensor"
)
# Composite: whoever compiles it gets its parts; an export to ONNX replaces it as a whole.
_library.impl("quantized_product", _product, "CompositeImplicitAutograd")


def product(
    x: Tensor, weight: Tensor, blocks: Tensor | None, number_format: NumberFormat, *, low: bool
) -> Tensor:
    """Multiply rows that were divided by their ranges with a quantized weight; see `_product`."""
    result: Tensor = torch.ops.pw.quantized_product(x, weight, blocks, number_format, low)
    return result


OP = register(Op("quantized_linear", reference, cost))
