# SPDX-License-Identifier: Apache-2.0
"""Attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pw_kernels.attention import attention_with_lse, reference_with_lse
from pw_kernels.attention.merge import OP, merge_attention
from pw_kernels.attention.variants import LARGE, run
from tests.closeness import max_abs
from tests.tolerance import ulp

SPLITS = [(150,), (75, 75), (1, 149), (149, 1), (64, 64, 22), (10,) * 15]


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, 64, generator=generator).to(dtype) for n in (40, 150, 150))
    return 3 * q, k, v


@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_whole_is_merge_of_parts(splits: tuple[int, ...]) -> None:
    q, k, v = inputs(torch.float32)
    bias = torch.zeros(len(k))
    bias[-1] = 2.5  # so for the last part only
    parts = list(zip(k.split(splits), v.split(splits), strict=True))
    results = [attention_with_lse(q, *part) for part in parts[:-1]]
    results.append(attention_with_lse(q, *parts[-1], bias[-splits[-1] :]))
    out, lse = merge_attention(*zip(*results, strict=True))
    expected, expected_lse = attention_with_lse(q, k, v, bias)
    assert max_abs(out, expected) < 1e-5  # log-sum-exps near 30: fp32 has them to 2e-6
    assert max_abs(lse, expected_lse) < 1e-5


def test_parts_from_the_triton_kernel() -> None:
    q, k, v = inputs(torch.float16)
    parts = zip(k.split((64, 86)), v.split((64, 86)), strict=True)
    results = [run(LARGE[64], q, *part) for part in parts]
    out, lse = merge_attention(*zip(*results, strict=True))
    expected, expected_lse = reference_with_lse(q.double(), k.double(), v.double())
    assert out.dtype == torch.float16
    assert max_abs(out, expected) <= 2 * ulp(expected, torch.float16)  # rounded twice
    assert max_abs(lse, expected_lse) < 1e-5


def test_part_that_weighs_nothing() -> None:
    """Log-sum-exps thousands apart, and of no key at all."""
    out = torch.ones(3, 2, 4)
    lse = torch.zeros(3, 2)
    for other in (-5000.0, -torch.inf):
        merged, merged_lse = merge_attention([out, 7 * out], [lse, lse + other])
        assert torch.equal(merged, out)
        assert torch.equal(merged_lse, lse)


def test_cost() -> None:
    out, lse = torch.empty(10, 2, 64, dtype=torch.bfloat16), torch.empty(10, 2)
    cost = OP.cost([out] * 3, [lse] * 3)
    assert cost.flops == 2 * 3 * 10 * 2 * 64
    assert cost.bytes == 4 * (10 * 2 * 64 * 2 + 10 * 2 * 4)


OUT, LSE = torch.zeros(3, 2, 4), torch.zeros(3, 2)
BAD: list[tuple[str, tuple[Any, Any], str]] = [
    ("nothing", ([], []), "at least one part"),
    ("counts", ([OUT, OUT], [LSE]), "2 log-sum-exps, one per part, got 1"),
    ("two dimensions", ([LSE], [LSE]), r"parts \[S, N, K\]"),
    ("other shape", ([OUT, OUT[:2]], [LSE, LSE]), r"every part \(3, 2, 4\), got \(2, 2, 4\)"),
    ("other dtype", ([OUT, OUT.half()], [LSE, LSE]), "every part in torch.float32"),
    ("lse shape", ([OUT], [LSE.T]), r"log-sum-exps \(3, 2\), got \(2, 3\)"),
    ("lse dtype", ([OUT], [LSE.half()]), "log-sum-exps in fp32, got torch.float16"),
    ("device", ([OUT], [LSE.to("meta")]), "all tensors on cpu, got meta"),
]


@pytest.mark.parametrize(("args", "match"), [case[1:] for case in BAD], ids=[c[0] for c in BAD])
def test_bad_input(args: tuple[Any, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"pw::merge_attention expects {match}"):
        merge_attention(*args)
