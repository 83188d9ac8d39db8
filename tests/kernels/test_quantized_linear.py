# SPDX-License-Identifier: Apache-2.0
"""Linear layers with 8-bit and 4-bit operands: what is exact in them, and how far they may err."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pw_kernels.op import OPS
from pw_kernels.quantized_linear import (
    E4M3,
    GRIDS,
    NumberFormat,
    _integer_product,
    _round_to_e2m1,
    dequantized,
    product,
    quantize_rows,
    quantized_linear,
)
from tests.closeness import relative_l2

FORMATS = list(GRIDS)
# Largest error of a number beside the largest of its row (int8) or of itself (the others).
STEP = {"int8": 0.5 / 127, "int8-weight": 0.5 / 127, "fp8": 2.0**-4, "nvfp4": 1 / 3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(x: Tensor, weight: Tensor, bias: Tensor, number_format: NumberFormat) -> Tensor:
    numbers, blocks, scale = quantize_rows(weight, number_format)
    return quantized_linear(x, numbers, scale, bias, blocks, number_format)


@pytest.mark.parametrize("width", [16, 1040, 1041, 5000])
@pytest.mark.parametrize("in_hardware", [False, True])
def test_a_product_of_int8_is_that_of_the_integers(
    width: int, in_hardware: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all are as large as they can be, and sums leave the integers that fp32 has."""
    monkeypatch.setattr("pw_kernels.quantized_linear.has_integer_products", lambda: in_hardware)
    generator = torch.Generator().manual_seed(width)
    x, weight = (
        torch.randint(-127, 128, (20, width), dtype=torch.int8, generator=generator)
        for _ in range(2)
    )
    x[0], weight[0] = 127, -127
    exact = x.long() @ weight.long().t()
    assert torch.equal(torch._int_mm(x, weight.t()).long(), exact)
    assert torch.equal(_integer_product(x, weight), exact.float())


def test_fp4_has_its_numbers_and_rounds_ties_to_the_even_one() -> None:
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.equal(_round_to_e2m1(numbers), numbers)
    between = (numbers[1:] + numbers[:-1]) / 2
    even = torch.tensor([0, 1, 1, 2, 2, 4, 4.0])
    assert torch.equal(_round_to_e2m1(between), even)
    assert torch.equal(_round_to_e2m1(-between), -even)
    assert torch.equal(_round_to_e2m1(between + 1e-4), numbers[1:])
    assert torch.equal(_round_to_e2m1(torch.tensor([7.0])), torch.tensor([6.0]))


@pytest.mark.parametrize("number_format", FORMATS)
def test_quantized_rows_are_within_a_step(number_format: NumberFormat) -> None:
    x = normal(8, 64) * torch.logspace(-6, 6, 8)[:, None]  # rows of very different ranges
    numbers, blocks, scale = quantize_rows(x, number_format)
    got = dequantized(numbers, blocks, number_format, torch.float32) * scale[:, None]
    shape = x.unflatten(-1, (-1, 16)) if blocks is not None else x[:, None]
    beside = shape.abs().amax(-1, keepdim=True).expand(shape.shape).flatten(1)
    if number_format == "fp8":
        beside = x.abs().clamp_min(beside * 2.0**-6 / E4M3)  # below that it has equal steps
    assert (got - x).abs().le(1.01 * STEP[number_format] * beside).all()


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_numbers_are_exact_in_every_dtype(
    number_format: NumberFormat, dtype: torch.dtype
) -> None:
    numbers, blocks, _ = quantize_rows(normal(32, 64), number_format)
    got = dequantized(numbers, blocks, number_format, dtype)
    assert torch.equal(got.double(), dequantized(numbers, blocks, number_format, torch.float64))


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_of_what_its_operands_stand_for(
    number_format: NumberFormat, dtype: torch.dtype
) -> None:
    x, weight, bias = normal(40, 96), normal(48, 96, seed=1), normal(48, seed=2)
    rows = x.to(dtype).double()
    if GRIDS[number_format].quantizes_input:
        numbers, blocks, scale = quantize_rows(x.to(dtype), number_format)
        rows = dequantized(numbers, blocks, number_format, torch.float64) * scale[:, None]
    numbers, blocks, scale = quantize_rows(weight, number_format)
    columns = dequantized(numbers, blocks, number_format, torch.float64) * scale[:, None]
    got = run(x.to(dtype), weight, bias.to(dtype), number_format)
    assert got.dtype == dtype
    exact = rows @ columns.t() + bias.to(dtype).double()
    # In bf16 the product and the result are rounded, and nvfp4 gets tokens rounded to bf16, which
    # decides some of its ties.
    rounding = 4 * torch.finfo(dtype).eps * (4 if number_format == "nvfp4" else 1)
    assert relative_l2(got, exact) < rounding


@pytest.mark.parametrize("number_format", FORMATS)
def test_a_token_is_quantized_by_its_own_range(number_format: NumberFormat) -> None:
    """A large token beside it, or a power of two, changes no digit of a token's result."""
    x, weight, bias = normal(3, 64), normal(32, 64, seed=1), torch.zeros(32)
    expected = run(x, weight, bias, number_format)
    scaled = x * torch.tensor([1.0, 1024.0, 2.0**-10])[:, None]
    got = run(scaled, weight, bias, number_format)
    assert torch.equal(got, expected * torch.tensor([1.0, 1024.0, 2.0**-10])[:, None])


@pytest.mark.parametrize("number_format", FORMATS)
def test_rows_of_zeros_give_the_bias(number_format: NumberFormat) -> None:
    weight, bias = normal(32, 64), normal(32, seed=1)
    assert torch.equal(run(torch.zeros(2, 64), weight, bias, number_format), bias.expand(2, 32))
    weight[3], x = 0, normal(5, 64)
    assert torch.equal(run(x, weight, bias, number_format)[:, 3], bias[3].expand(5))


@pytest.mark.parametrize("number_format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(number_format: NumberFormat, bad: float) -> None:
    x = normal(3, 64)
    x[1, 5] = bad
    got = run(x, normal(32, 64, seed=1), torch.zeros(32), number_format)
    assert not got[1].isfinite().any()
    assert got[[0, 2]].isfinite().all()


def test_a_weight_of_another_format_is_refused() -> None:
    numbers, _, scale = quantize_rows(normal(32, 64), "int8")
    with pytest.raises(ValueError, match=r"fp8 weights as torch.float8_e4m3fn, got torch.int8"):
        quantized_linear(normal(3, 64), numbers, scale, torch.zeros(32), None, "fp8")
    fp4, _, scale = quantize_rows(normal(32, 64), "nvfp4")
    with pytest.raises(ValueError, match="scales of blocks for nvfp4"):
        quantized_linear(normal(3, 64), fp4, scale, torch.zeros(32), None, "nvfp4")


def test_the_product_is_one_operator_for_an_export_and_parts_for_a_compiler() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return product(x, weight, None, "int8", low=False)

    weight = quantize_rows(normal(8, 16), "int8")[0]
    program = torch.export.export(Layer(), (normal(4, 16) / 8, weight))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "pw.quantized_product.default" in targets
    parts = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert not any("quantized_product" in part for part in parts)


@pytest.mark.parametrize(("number_format", "weight_bytes"), [("int8", 2048), ("nvfp4", 1024 + 128)])
def test_the_cost_counts_the_bytes_of_weights(
    number_format: NumberFormat, weight_bytes: int
) -> None:
    numbers, blocks, scale = quantize_rows(normal(32, 64), number_format)
    cost = OPS["quantized_linear"].cost(
        normal(10, 64), numbers, scale, torch.empty(32), blocks, number_format
    )
    assert cost.bytes == weight_bytes + 4 * (640 + 32 + 32 + 320)
    assert cost.flops == 2 * 10 * 64 * 32
