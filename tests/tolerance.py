# SPDX-License-Identifier: Apache-2.0
"""Bounds on a result's error, derived from the dtype and from another implementation's error.

No bound is tuned to one machine: another instruction set rounds some products differently by one
unit in the last place, and a result that does so must pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.closeness import max_abs, relative_l2


def ulp(values: Tensor, dtype: torch.dtype) -> float:
    """Return the distance between neighbours in `dtype` at the largest magnitude of `values`."""
    _, exponent = math.frexp(values.abs().max().item())
    return torch.finfo(dtype).eps * 2.0 ** (exponent - 1)


def assert_as_accurate(
    got: Tensor, twin: Tensor, exact: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Check that `got` errs at most twice as much as `twin` does, and one rounding.

    Args:
        got: the result under test.
        twin: the same values by other code in the same precision.
        exact: the same values in a higher precision.
        dtype: the coarser of the dtypes that `got` and `twin` were rounded to; None: the dtype of
            `got`.
    """
    dtype = dtype or got.dtype
    limit = 2 * max_abs(twin, exact) + ulp(exact, dtype)
    assert max_abs(got, exact) <= limit, f"error {max_abs(got, exact):.3g}, limit {limit:.3g}"
    limit = 2 * relative_l2(twin, exact) + torch.finfo(dtype).eps / 2
    error = relative_l2(got, exact)
    assert error <= limit, f"relative error {error:.3g}, limit {limit:.3g}"
