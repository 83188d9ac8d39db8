# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of norm_modulate, interpreted, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pw_kernels.norm_modulate import reference, run_kernel
from tests.kernels.accuracy import assert_as_accurate, assert_same_roundings, normal

EPS = 1e-6


def oracle(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    x = x.double()
    normed = (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    repeats = x.shape[0] // shift.shape[0]
    shift, scale = (row.double().repeat_interleave(repeats, 0) for row in (shift, scale))
    return normed * (1 + scale) + shift


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "rows", "dim"),
    [(1, 1, 192), (9, 1, 192), (7, 7, 64), (9, 3, 192), (9, 1, 128), (2, 1, 3072)],
)
def test_kernel(
    tokens: int, rows: int, dim: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    x = 3 * normal(tokens, dim, dtype=dtype) + 1
    shift, scale = normal(rows, 6, dim, seed=1).unbind(1)[:2]  # strided, as in the network
    got = run_kernel(x, shift, scale, EPS, out_dtype)
    expected = reference(x, shift, scale, EPS, out_dtype)
    assert_as_accurate(got, expected, oracle(x, shift, scale))
    if dtype == out_dtype == torch.bfloat16:
        assert_same_roundings(got, expected)


def test_shift_and_scale_of_different_strides() -> None:
    x, shift = normal(6, 64), normal(2, 64, seed=1)
    scale = normal(2, 6, 64, seed=2)[:, 3]
    got = run_kernel(x, shift, scale, EPS, torch.float32)
    expected = reference(x, shift, scale, EPS, torch.float32)
    assert_as_accurate(got, expected, oracle(x, shift, scale))


def test_a_constant_token_gives_the_shift() -> None:
    x, shift, scale = torch.full((3, 192), 7.0), normal(1, 192), normal(1, 192, seed=1)
    got = run_kernel(x, shift, scale, EPS, torch.float32)
    torch.testing.assert_close(got, shift.expand(3, -1), rtol=0, atol=2e-3)
