# SPDX-License-Identifier: Apache-2.0
"""The transformer's pointwise kernels check their input, and say what they expect."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pw_kernels import Update, launcher
from pw_kernels.dispatch_anywhere import dispatch_anywhere
from pw_kernels.op import using
from tests.kernels.accuracy import normal
from tests.kernels.pointwise import CASES, Case, results

NORM, GATE, QK = (CASES[name] for name in ("norm_modulate", "gate_residual", "qk_norm_rope"))
BOTH, MODULATED, STEP = (CASES[name] for name in ("gated, affine", "modulated", "guided_update"))
OLD = Update(0.5, 0.5, 0.5, 0.0, 0.5, 1.0)

BAD = [
    (NORM, 0, normal(48, 6).t(), "expects x contiguous"),
    (NORM, 0, normal(2, 3, 48), "expects x contiguous"),
    (NORM, 0, normal(7, 48), "expects rows .R, 48. with R dividing the 7 tokens"),
    (NORM, 0, normal(0, 48), "expects at least one token"),
    (NORM, 1, normal(2, 40), "expects rows"),
    (NORM, 2, normal(2, 48).half(), "expects fp32 rows"),
    (NORM, 2, normal(48, 2).t(), "expects rows contiguous along D"),
    (NORM, 1, normal(2, 48).to("meta"), "expects all tensors on cpu"),
    (GATE, 0, normal(48, 6).t(), "expects x contiguous"),
    (GATE, 0, normal(6, 48).int(), "expects x fp32, bf16 or fp16"),
    (GATE, 1, normal(6, 40), "expects y of x's shape"),
    (GATE, 1, normal(48, 6).t(), "expects y contiguous"),
    (GATE, 1, normal(6, 48).double(), "expects y fp32, bf16 or fp16"),
    (GATE, 1, normal(6, 48).to("meta"), "expects all tensors on cpu"),
    (GATE, 2, normal(48), "expects a gate .R, 48., got .48,."),
    (GATE, 2, normal(4, 48), "expects R to divide the 6 tokens"),
    (GATE, 2, normal(0, 48), "expects R to divide the 6 tokens"),
    (GATE, 2, normal(2, 48).bfloat16(), "expects an fp32 gate"),
    (GATE, 2, normal(48, 2).t(), "expects a gate contiguous along D"),
    (BOTH, 0, normal(48, 6).t(), "expects x contiguous"),
    (BOTH, 0, normal(0, 48), "expects at least one token"),
    (BOTH, 0, normal(6, 48).bfloat16(), "expects x fp32, to be overwritten, got torch.bfloat16"),
    (BOTH, 1, normal(6, 40), "expects y of x's shape"),
    (BOTH, 1, normal(48, 6).t(), "expects y contiguous"),
    (BOTH, 1, normal(6, 48).double(), "expects y fp32, bf16 or fp16"),
    (BOTH, 1, normal(6, 48).to("meta"), "expects all tensors on cpu"),
    (BOTH, 2, normal(48), "expects rows .R, 48. with R dividing the 6 tokens, got .48,."),
    (BOTH, 2, normal(4, 48), "expects rows .R, 48. with R dividing the 6 tokens"),
    (BOTH, 2, normal(2, 48).bfloat16(), "expects gate, weight and bias in fp32"),
    (BOTH, 2, normal(48, 2).t(), "expects gate, weight and bias contiguous along D"),
    (BOTH, 3, normal(2, 48), "expects weight and bias of shape .48,. unless modulated"),
    (BOTH, 4, normal(48).half(), "expects gate, weight and bias in fp32"),
    (BOTH, 7, True, "expects rows .R, 48. with R dividing the 6 tokens, got .48,."),
    (MODULATED, 3, normal(0, 48), "expects rows"),
    (MODULATED, 4, normal(3, 48), "expects all rows of one shape .2, 48., got .3, 48."),
    (MODULATED, 2, normal(3, 48), "expects all rows of one shape .3, 48., got .2, 48."),
    (MODULATED, 7, False, "expects weight and bias of shape .48,. unless modulated"),
    (QK, 0, normal(48), "expects q .S, D."),
    (QK, 0, normal(6, 48).double(), "expects q fp32, bf16 or fp16"),
    (QK, 1, normal(5, 48).bfloat16(), "expects k of q's shape"),
    (QK, 1, normal(6, 48), "expects k and weights in q's torch.bfloat16"),
    (QK, 1, normal(48, 6).t().bfloat16(), "expects q and k contiguous along D"),
    (QK, 1, normal(1, 48).bfloat16().expand(6, -1), "expects rows of q and k that do not overlap"),
    (QK, 2, normal(47).bfloat16(), "expects weights of shape .48,."),
    (QK, 3, normal(48), "expects k and weights in q's torch.bfloat16"),
    (QK, 3, normal(96).bfloat16()[::2], "expects contiguous weights"),
    (QK, 3, normal(48).bfloat16().to("meta"), "expects all tensors on cpu"),
    (QK, 4, normal(6, 16), r"expects cos and sin of shape .1 or more, 8., got .6, 16."),
    (QK, 5, normal(6, 8).bfloat16(), "expects cos and sin in fp32"),
    (QK, 5, normal(8, 6).t(), "expects contiguous cos and sin"),
    (QK, 5, normal(4, 8), "expects cos and sin of one shape"),
    (QK, 6, torch.tensor([0, 2]), "expects origin .3., got .2,."),
    (QK, 6, normal(3), "expects origin in int64"),
    (QK, 6, torch.zeros(6, dtype=torch.int64)[::2], "expects contiguous origin"),
    (QK, 7, 5, "expects num_heads that splits 48 channels"),
    (QK, 7, 48, "expects num_heads that splits 48 channels"),
    (QK, 7, 0, "expects num_heads that splits 48 channels"),
    (STEP, 0, normal(2, 3, 4).half(), "expects fp32"),
    (STEP, 1, normal(2, 3, 5), "expects all tensors of x's shape .2, 3, 4."),
    (STEP, 2, normal(4, 3, 2).transpose(0, 2), "expects contiguous tensors"),
    (STEP, 3, normal(2, 3, 4).to("meta"), "expects all tensors on cpu"),
    (STEP, 4, None, "expects every prediction that the corrector uses"),
    (STEP, 5, None, "expects every prediction that the corrector uses"),
    (CASES["first step"], 9, OLD, "expects every prediction that the predictor uses"),
    (STEP, 9, Update(0.5, 0.5, 0.5, 0.5), "expects a predictor without new_weight"),
]


@pytest.mark.parametrize(("case", "index", "value", "message"), BAD)
def test_bad_input(case: Case, index: int, value: Any, message: str) -> None:
    with (
        using("triton"),
        dispatch_anywhere(),
        pytest.raises(ValueError, match=f"pw::{case.name} {message}"),
    ):
        case.function(*case.with_argument(index, value))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_requested_kernel_is_launched_by_the_public_function(case: Case) -> None:
    before = launcher.tally.total()
    with using("triton"), dispatch_anywhere():
        outputs = results(case.function, case.arguments)
    assert launcher.tally.total() == before + 1
    for output, expected in zip(
        outputs, results(case.module.reference, case.arguments), strict=True
    ):
        torch.testing.assert_close(output, expected)
