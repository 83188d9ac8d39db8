# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of gate_residual, interpreted, against PyTorch."""

from __future__ import annotations

import pytest
import torch

from pw_kernels.gate_residual import reference, run_kernel
from tests.kernels.accuracy import assert_as_accurate, normal


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "rows", "dim"),
    [(1, 1, 192), (9, 1, 192), (7, 7, 64), (9, 3, 192), (9, 1, 128), (2, 1, 3072)],
)
def test_kernel(
    tokens: int, rows: int, dim: int, x_dtype: torch.dtype, y_dtype: torch.dtype
) -> None:
    x, y = normal(tokens, dim, dtype=x_dtype), normal(tokens, dim, dtype=y_dtype, seed=1)
    gate = normal(rows, 6, dim, seed=2)[:, 5]  # strided, as in the network
    got = run_kernel(x, y, gate)
    wide = gate.double().repeat_interleave(tokens // rows, 0)
    assert got.dtype == torch.float32
    assert_as_accurate(got, reference(x, y, gate), x.double() + y.double() * wide)
