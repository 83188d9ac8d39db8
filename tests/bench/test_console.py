# SPDX-License-Identifier: Apache-2.0
"""The tables on the terminal show what weakens their numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pw_bench.report.console import show
from pw_bench.result_sections import OutputDifference, Ratio
from tests.bench.small_results import CLIP, KERNELS, figure, result

STEADY = figure("ours/warm", 1.0, 1.0, 1.0)
RATIO = Ratio(side="ours", against="official", warm=2.0)


def printed(capsys: pytest.CaptureFixture[str], theirs: tuple[float, ...]) -> str:
    show(result(STEADY, figure("official/warm", *theirs), ratios=(RATIO,)))
    return " ".join(capsys.readouterr().out.split())


def test_ratio_of_unstable_figures_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(unstable: official/warm)" in printed(capsys, (1.0, 2.0, 3.0))
    stable = printed(capsys, (2.0, 2.0, 2.0))
    assert "2.00 x as fast warm (outputs: ours not compared" in stable
    assert "unstable" not in stable


def test_problems_of_the_machine_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    plain = result(STEADY)
    show(replace(plain, identity=replace(plain.identity, dirty=True, nvml="denied")))
    out = capsys.readouterr().out
    assert "NVML: denied" in out
    assert "files differed from commit abc" in out
    show(plain)
    assert "commit" not in capsys.readouterr().out


def test_kernels_have_a_table_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    show(KERNELS)
    out = " ".join(capsys.readouterr().out.split())
    assert "differs when repeated" in out
    assert "is for another GPU" in out


def test_differences_and_memory_beside_the_plan_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    difference = OutputDifference(
        side="ours", against="diffusers", max_abs=70, unit="levels of 255", share=0.5
    )
    clip = replace(CLIP, measured={"draft": {"host": 3 * 2**30}})
    show(result(kind="generate-memory", clips=(clip,), differences=(difference,)))
    out = " ".join(capsys.readouterr().out.split())
    assert "ours against diffusers: differs by 70 (levels of 255) at most" in out
    assert "draft, host: predicted 1.50 GiB, measured 3.00 GiB, 2.000 of it" in out
