# SPDX-License-Identifier: Apache-2.0
"""When a kernel is as accurate as plain PyTorch, and the inputs to find out with."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.closeness import max_abs, relative_l2


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normally distributed numbers of `dtype`, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_as_accurate(got: Tensor, reference: Tensor, oracle: Tensor) -> None:
    """At most twice the reference's distance from the fp64 `oracle`, and one rounding."""
    assert got.dtype == reference.dtype
    assert oracle.dtype == torch.float64
    rounding = torch.finfo(got.dtype).eps
    largest = oracle.abs().max().item()
    assert max_abs(got, oracle) <= 2 * max_abs(reference, oracle) + rounding * largest
    assert relative_l2(got, oracle) <= 2 * relative_l2(reference, oracle) + rounding


def assert_same_roundings(got: Tensor, reference: Tensor) -> None:
    """99 of 100 values equal: a bf16 rounding too many or too few changes one in four."""
    assert got.dtype == torch.bfloat16
    assert (got == reference).double().mean().item() > 0.99
