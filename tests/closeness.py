# SPDX-License-Identifier: Apache-2.0
"""The two distances that every comparison in the tests uses."""

from __future__ import annotations

from torch import Tensor


def max_abs(got: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference; shapes must agree."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)} is not {tuple(wanted.shape)}"
    return (got.double() - wanted.double()).abs().max().item()


def relative_l2(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|; shapes must agree."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)} is not {tuple(wanted.shape)}"
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).norm() / wanted.norm()).item()
