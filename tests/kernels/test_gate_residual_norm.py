# SPDX-License-Identifier: Apache-2.0
"""gate_residual_norm: its Triton kernel, interpreted, and its reference against its parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.gate_residual import reference as gate_residual
from pw_kernels.gate_residual_norm import reference, run_kernel
from pw_kernels.norm_modulate import reference as norm_modulate
from tests.kernels.accuracy import assert_as_accurate, assert_same_roundings, normal

EPS = 1e-6


def oracle(
    x: Tensor, y: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, modulated: bool
) -> tuple[Tensor, Tensor]:
    def rows(row: Tensor) -> Tensor:
        return row.double().repeat_interleave(x.shape[0] // row.shape[0], 0)

    x = x.double() + (y.double() if gate is None else y.double() * rows(gate))
    normed = (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    if modulated:
        return x, normed * (1 + rows(weight)) + rows(bias)
    return x, normed * weight.double() + bias.double()


def inputs(
    tokens: int, rows: int, dim: int, gated: bool, modulated: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """gate, weight and bias, strided as in the network."""
    modulation = normal(rows, 6, dim, seed=2)
    gate = modulation[:, 2] if gated else None
    if modulated:
        return gate, modulation[:, 4], modulation[:, 3]
    return gate, 1 + normal(dim, seed=3) / 4, normal(dim, seed=4)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "rows", "dim"),
    [(1, 1, 192), (9, 1, 48), (7, 7, 64), (8, 2, 96), (9, 3, 192), (2, 1, 3072)],
)
def test_kernel(
    tokens: int, rows: int, dim: int, dtype: torch.dtype, gated: bool, modulated: bool
) -> None:
    x, y = 3 * normal(tokens, dim) + 1, normal(tokens, dim, dtype=dtype, seed=1)
    norm = inputs(tokens, rows, dim, gated, modulated)
    ours, theirs = x.clone(), x.clone()
    got = run_kernel(ours, y, *norm, EPS, dtype, modulated)
    expected = reference(theirs, y, *norm, EPS, dtype, modulated)
    exact, exact_normed = oracle(x, y, *norm, modulated)
    assert_as_accurate(ours, theirs, exact)
    assert_as_accurate(got, expected, exact_normed)
    if dtype == torch.bfloat16:
        assert_same_roundings(got, expected)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows", "dim"), [(63, 1, 48), (200, 8, 96), (4, 2, 3072)])
def test_reference_is_its_parts_to_the_last_bit(
    tokens: int, rows: int, dim: int, y_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    x, y = 3 * normal(tokens, dim) + 1, normal(tokens, dim, dtype=y_dtype, seed=1)

    gate, weight, bias = inputs(tokens, rows, dim, True, False)
    residual = x.clone()
    got = reference(residual, y, gate, weight, bias, EPS, out_dtype)
    assert gate is not None
    expected = gate_residual(x, y, gate)
    assert torch.equal(residual, expected)
    assert torch.equal(got, F.layer_norm(expected, (dim,), weight, bias, EPS).to(out_dtype))

    _, scale, shift = inputs(tokens, rows, dim, False, True)
    residual = x.clone()
    got = reference(residual, y, None, scale, shift, EPS, out_dtype, modulated=True)
    expected = x + y
    assert torch.equal(residual, expected)
    assert torch.equal(got, norm_modulate(expected, shift, scale, EPS, out_dtype))


def test_weight_and_bias_of_different_strides() -> None:
    x, y, bias = normal(6, 64), normal(6, 64, seed=1), normal(2, 64, seed=2)
    scale = normal(2, 6, 64, seed=3)[:, 3]
    arguments = (y, None, scale, bias, EPS, torch.float32, True)
    got, expected = run_kernel(x.clone(), *arguments), reference(x.clone(), *arguments)
    assert_as_accurate(got, expected, oracle(x, y, None, scale, bias, True)[1])
