# SPDX-License-Identifier: Apache-2.0
"""`pw bench sparse-error`: what its figures are made of."""

from __future__ import annotations

import pytest
import torch

from pw_bench.quality import sparse_error
from pw_bench.quality.sparse_error import attention_errors, dropped, smooth_field
from pw_kernels import attention
from tests.closeness import max_abs

GRID = (2, 24, 28)  # 1344 tokens, 11 blocks


def test_errors_shrink_with_what_is_kept_and_means_are_worth_having(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sparse_error, "KEEPS", (0.8, 0.5))
    q, k, v = smooth_field(GRID, 10.0)
    errors = dict(attention_errors(q, k, v, GRID, attention(q, k, v)))
    assert list(errors) == [
        "80% kept",
        "80% kept, others dropped",
        "50% kept",
        "50% kept, others dropped",
    ]
    assert 0 < errors["80% kept"] < errors["50% kept"] < errors["50% kept, others dropped"]


def test_dropping_nothing_is_exact() -> None:
    q, k, v = (x.double() for x in smooth_field(GRID, 4.0))
    assert max_abs(dropped(q, k, v, GRID, 1.0), attention(q, k, v)) < 1e-12
    assert torch.equal(*(smooth_field(GRID, 4.0)[0] for _ in range(2)))
