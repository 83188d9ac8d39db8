# SPDX-License-Identifier: Apache-2.0
"""Ranks exchange what they should, and none waits for one that is gone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.parallel.ranks import run


def test_uneven_parts_arrive_whole_and_are_counted(tmp_path: Path) -> None:
    for count, results in run("tests.parallel.exchanges:uneven", tmp_path, [2, 3]).items():
        for rank, (exchanged, gathered, line, sent) in enumerate(results):
            parts = [torch.full((other * rank,), 100.0 * other + rank) for other in range(count)]
            assert torch.equal(exchanged, torch.cat(parts))
            everyone = torch.arange(count).repeat_interleave(2).to(torch.bfloat16)
            assert torch.equal(gathered, everyone)
            assert line.item() == (rank or 1)
            others = sum(other * rank for other in range(count) if other != rank)
            assert sent["numbers"] == 4 * others
            assert sent["ranks"] == 2 * 2 * (count - 1)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("killed", "was killed, or ended without a word"),
        ("raising", "failed: this rank cannot go on"),
        ("diverging", r"went another way than rank [01] \(draft 7, step 4: second of a test\)"),
    ],
)
def test_every_rank_learns_which_rank_failed_and_where(
    fault: str, what: str, tmp_path: Path
) -> None:
    results = run(f"tests.parallel.exchanges:{fault}", tmp_path, [3])[3]
    for text in results[:2]:
        assert re.match(f"RankFailed: rank 2 {what}; it was at draft 7, step 3", text)
