# SPDX-License-Identifier: Apache-2.0
"""What the transformer's pointwise kernels refuse, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pw_kernels import Update, op
from tests.kernels.accuracy import normal
from tests.kernels.pointwise import CASES, Case, results, same

NORM, GATE, QK = (CASES[name] for name in ("norm_modulate", "gate_residual", "qk_norm_rope"))
BOTH, MODULATED, STEP = (CASES[name] for name in ("gated, affine", "modulated", "guided_update"))
OLD = Update(0.5, 0.5, 0.5, 0.0, 0.5, 1.0)

BAD = [
    (NORM, 0, normal(48, 6).t(), "wants x contiguous"),
    (NORM, 0, normal(2, 3, 48), "wants x contiguous"),
    (NORM, 0, normal(7, 48), "wants rows .R, 48. with R dividing the 7 tokens"),
    (NORM, 0, normal(0, 48), "wants at least one token"),
    (NORM, 1, normal(2, 40), "wants rows"),
    (NORM, 2, normal(2, 48).half(), "wants fp32 rows"),
    (NORM, 2, normal(48, 2).t(), "wants rows contiguous along D"),
    (NORM, 1, normal(2, 48).to("meta"), "wants all tensors on cpu"),
    (GATE, 0, normal(48, 6).t(), "wants x contiguous"),
    (GATE, 0, normal(6, 48).int(), "wants x fp32, bf16 or fp16"),
    (GATE, 1, normal(6, 40), "wants y of x's shape"),
    (GATE, 1, normal(48, 6).t(), "wants y contiguous"),
    (GATE, 1, normal(6, 48).double(), "wants y fp32, bf16 or fp16"),
    (GATE, 1, normal(6, 48).to("meta"), "wants all tensors on cpu"),
    (GATE, 2, normal(48), "wants a gate .R, 48., got .48,."),
    (GATE, 2, normal(4, 48), "wants R to divide the 6 tokens"),
    (GATE, 2, normal(0, 48), "wants R to divide the 6 tokens"),
    (GATE, 2, normal(2, 48).bfloat16(), "wants an fp32 gate"),
    (GATE, 2, normal(48, 2).t(), "wants a gate contiguous along D"),
    (BOTH, 0, normal(48, 6).t(), "wants x contiguous"),
    (BOTH, 0, normal(0, 48), "wants at least one token"),
    (BOTH, 0, normal(6, 48).bfloat16(), "wants x fp32, to be overwritten, got torch.bfloat16"),
    (BOTH, 1, normal(6, 40), "wants y of x's shape"),
    (BOTH, 1, normal(48, 6).t(), "wants y contiguous"),
    (BOTH, 1, normal(6, 48).double(), "wants y fp32, bf16 or fp16"),
    (BOTH, 1, normal(6, 48).to("meta"), "wants all tensors on cpu"),
    (BOTH, 2, normal(48), "wants rows .R, 48. with R dividing the 6 tokens, got .48,."),
    (BOTH, 2, normal(4, 48), "wants rows .R, 48. with R dividing the 6 tokens"),
    (BOTH, 2, normal(2, 48).bfloat16(), "wants gate, weight and bias in fp32"),
    (BOTH, 2, normal(48, 2).t(), "wants gate, weight and bias contiguous along D"),
    (BOTH, 3, normal(2, 48), "wants weight and bias of shape .48,., not modulated"),
    (BOTH, 4, normal(48).half(), "wants gate, weight and bias in fp32"),
    (BOTH, 7, True, "wants rows .R, 48. with R dividing the 6 tokens, got .48,."),
    (MODULATED, 3, normal(0, 48), "wants rows"),
    (MODULATED, 4, normal(3, 48), "wants all rows of one shape .2, 48., got .3, 48."),
    (MODULATED, 2, normal(3, 48), "wants all rows of one shape .3, 48., got .2, 48."),
    (MODULATED, 7, False, "wants weight and bias of shape .48,., not modulated"),
    (QK, 0, normal(48), "wants q .S, D."),
    (QK, 0, normal(6, 48).double(), "wants q fp32, bf16 or fp16"),
    (QK, 1, normal(5, 48).bfloat16(), "wants k of q's shape"),
    (QK, 1, normal(6, 48), "wants k and gains in q's torch.bfloat16"),
    (QK, 1, normal(48, 6).t().bfloat16(), "wants q and k contiguous along D"),
    (QK, 1, normal(1, 48).bfloat16().expand(6, -1), "wants rows of q and k apart"),
    (QK, 2, normal(47).bfloat16(), "wants gains of shape .48,."),
    (QK, 3, normal(48), "wants k and gains in q's torch.bfloat16"),
    (QK, 3, normal(96).bfloat16()[::2], "wants contiguous gains"),
    (QK, 3, normal(48).bfloat16().to("meta"), "wants all tensors on cpu"),
    (QK, 4, normal(6, 16), r"wants cos and sin of shape .1 or more, 8., got .6, 16."),
    (QK, 5, normal(6, 8).bfloat16(), "wants cos and sin in fp32"),
    (QK, 5, normal(8, 6).t(), "wants contiguous cos and sin"),
    (QK, 5, normal(4, 8), "wants cos and sin of one shape"),
    (QK, 6, torch.tensor([0, 2]), "wants place .3., got .2,."),
    (QK, 6, normal(3), "wants place in int64"),
    (QK, 6, torch.zeros(6, dtype=torch.int64)[::2], "wants contiguous place"),
    (QK, 7, 5, "wants num_heads that splits 48 channels"),
    (QK, 7, 48, "wants num_heads that splits 48 channels"),
    (QK, 7, 0, "wants num_heads that splits 48 channels"),
    (STEP, 0, normal(2, 3, 4).half(), "wants fp32"),
    (STEP, 1, normal(2, 3, 5), "wants all tensors of x's shape .2, 3, 4."),
    (STEP, 2, normal(4, 3, 2).transpose(0, 2), "wants contiguous tensors"),
    (STEP, 3, normal(2, 3, 4).to("meta"), "wants all tensors on cpu"),
    (STEP, 4, None, "wants every prediction that the corrector takes"),
    (STEP, 5, None, "wants every prediction that the corrector takes"),
    (CASES["first step"], 9, OLD, "wants every prediction that the predictor takes"),
    (STEP, 9, Update(0.5, 0.5, 0.5, 0.5), "wants a predictor without new_weight"),
]


@pytest.mark.parametrize(("case", "index", "value", "message"), BAD)
def test_bad_input(
    case: Case, index: int, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Checks stand before the operator; a machine without a GPU gets there by this alone.
    monkeypatch.setattr(case.module, "chosen", lambda *_: op.Choice("triton", "a test"))
    with pytest.raises(ValueError, match=f"pw::{case.name} {message}"):
        case.function(*case.with_argument(index, value))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_good_input_passes_the_checks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case.module, "chosen", lambda *_: op.Choice("triton", "a test"))
    wanted = results(case.module.reference, case.arguments)
    assert same(results(case.function, case.arguments), wanted)
