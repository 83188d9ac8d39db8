# SPDX-License-Identifier: Apache-2.0
"""Ranks exchange what they should, and none waits for one that is gone."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from pw_runtime.system import rank_meeting
from pw_runtime.system.rank_meeting import Place
from pw_runtime.system.rank_watch import RankWatch
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
        pytest.param(
            "ahead",
            r"went another way than rank 0 \(draft 7, step 4: next command\)",
            marks=pytest.mark.slow,
        ),
        ("killed", "was killed, or ended without a word"),
        ("raising", "failed: this rank cannot go on"),
        ("diverging", r"went another way than rank [01] \(draft 7, step 4: second of a test\)"),
        ("refused", r"failed: NCCL error in: x.cpp:1, [\w ]+: Cuda failure 2 'out of memory'"),
    ],
)
def test_every_rank_learns_which_rank_failed_and_where(
    fault: str, what: str, tmp_path: Path
) -> None:
    results = run(f"tests.parallel.exchanges:{fault}", tmp_path, [3])[3]
    for text in results[:2]:
        assert re.match(f"RankFailed: rank 2 {what}; it was at draft 7, step 3", text)


def test_a_rank_without_memory_for_engines_leaves_no_rank_alone_in_forming_groups(
    tmp_path: Path,
) -> None:
    ends = run("tests.parallel.exchanges:short_of_memory", tmp_path, [2])[2][0]
    assert ends == ["out of memory on rank 1", "loaded"]


@pytest.mark.slow
def test_a_rank_may_check_its_files_while_the_others_wait_with_the_next_command(
    tmp_path: Path,
) -> None:
    """Seen: one that had half of the command, or all of it, blamed one that had less of it."""
    assert run("tests.parallel.exchanges:busy", tmp_path, [4])[4] == ["end"] * 4


def test_connections_are_made_within_the_deadline_of_the_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those between GPUs are made late, through the store."""
    limits: list[timedelta] = []

    def ranks(store: Store, *arguments: object) -> SimpleNamespace:
        limits.append(store.timeout)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(rank_meeting, "Ranks", ranks)
    monkeypatch.setattr(RankWatch, "start", lambda watch: None)
    place = Place(0, 1, 0, "127.0.0.1", 0, hosting=True)
    with rank_meeting.joined(place, lambda: (torch.device("cpu"), {}), deadline=7):
        assert limits == [timedelta(seconds=7)]
