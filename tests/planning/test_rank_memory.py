# SPDX-License-Identifier: Apache-2.0
"""The closed form of what each rank holds, against a count of the tensors on ranks that ran."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pw_runtime.planning.transformer_memory import stage_memory
from pw_runtime.types import Split, TransformerPlan
from tests.parallel.ranks import run
from tests.planning.accounts import TEXT_TOKENS
from tests.planning.rank_accounts import CONFIG, STAGE, VIDEO

LEAST, MOST = 0.97, 1.1  # with three slices or more in a rank the account is closer
PLANS = [
    TransformerPlan(split=Split(sequence=3), chunk=256),
    TransformerPlan(split=Split(sequence=3), chunk=128, share_attention=False),
    TransformerPlan(split=Split(sequence=3), chunk=256, weights="gathered"),
]


@pytest.mark.slow
def test_each_rank_of_a_stage_holds_what_the_plan_says(tmp_path: Path) -> None:
    plans = json.dumps([asdict(plan) for plan in PLANS])
    ranks = run("tests.planning.rank_accounts:peaks", tmp_path, [3], plans)[3]
    for rank, counted in enumerate(ranks):
        assert not isinstance(counted, str), counted
        for plan, peak in zip(PLANS, counted, strict=True):
            items = stage_memory(
                CONFIG, STAGE, VIDEO, "fp32", plan, text_tokens=TEXT_TOKENS, rank=rank
            )
            ratio = sum(x.bytes for x in items) / peak
            assert LEAST <= ratio <= MOST, (rank, plan)
