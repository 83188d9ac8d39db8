# SPDX-License-Identifier: Apache-2.0
"""The short table on the terminal says what speaks against its numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pw_bench.report.console import show
from pw_bench.results import Ratio
from tests.bench.results_made import figure, result

STEADY = figure("ours/warm", 1.0, 1.0, 1.0)
RATIO = Ratio(side="ours", against="official", warm=2.0)


def shown(capsys: pytest.CaptureFixture[str], theirs: tuple[float, ...]) -> str:
    show(result(STEADY, figure("official/warm", *theirs), ratios=(RATIO,)))
    return " ".join(capsys.readouterr().out.split())


def test_a_ratio_of_unstable_figures_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "2.00 x warm (unstable: official/warm)" in shown(capsys, (1.0, 2.0, 3.0))
    assert "2.00 x warm (" not in shown(capsys, (2.0, 2.0, 2.0))


def test_what_is_wrong_with_the_machine_block_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    made = result(STEADY)
    show(replace(made, identity=replace(made.identity, dirty=True, nvml="denied")))
    out = capsys.readouterr().out
    assert "NVML: denied" in out
    assert "files differed from commit abc" in out
    show(made)
    assert "commit" not in capsys.readouterr().out
