# SPDX-License-Identifier: Apache-2.0
"""`pw bench compare`: what counts as a change, and what is not compared at all."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pw_bench.report import markdown, write_html
from pw_bench.report.findings import TITLES
from pw_bench.report.regressions import change, compare_results
from pw_bench.results import FORMAT, Result, read_result, write_result
from pw_runtime.cli.bench import compare
from pw_runtime.cli.options import SOME_FAILED
from pw_runtime.errors import BadRequest
from tests.bench.small_results import MACHINE, figure, result


def noisy(seed: int, around: float, spread: float = 0.02) -> tuple[float, ...]:
    source = random.Random(seed)
    return tuple(around * source.gauss(1, spread) for _ in range(9))


def test_ten_percent_more_is_slower_and_ten_percent_less_faster() -> None:
    old = figure("a", *noisy(1, 5.0))
    assert change(old, figure("a", *noisy(2, 5.5))).verdict == "slower"
    assert change(old, figure("a", *noisy(3, 4.5))).verdict == "faster"
    assert change(replace(old, unit="B"), figure("a", *noisy(2, 5.5), unit="B")).verdict == "larger"


def test_the_same_program_twice_is_the_same() -> None:
    """Five hundred pairs of runs of nothing but noise."""
    verdicts = [
        change(figure("a", *noisy(2 * i, 5.0)), figure("a", *noisy(2 * i + 1, 5.0))).verdict
        for i in range(500)
    ]
    assert verdicts.count("same") >= 495


def test_a_drift_of_half_the_spread_is_no_change() -> None:
    """Two runs of one program, some minutes apart, on a machine that others use too."""
    first = (4.88, 4.97, 5.00, 5.00, 5.02, 5.11, 5.12, 5.16, 5.16, 5.17)
    later = (5.01, 5.05, 5.11, 5.24, 5.26, 5.27, 5.34, 5.34, 5.58, 5.62)
    assert change(figure("a", *first), figure("a", *later)).verdict == "same"
    slowed = (5.61, 5.63, 5.79, 5.85, 5.9, 6.02, 6.29, 6.32, 6.33, 7.22)
    assert change(figure("a", *first), figure("a", *slowed)).verdict == "slower"
    assert change(figure("a", *later), figure("a", *slowed)).verdict == "slower"


def test_equal_samples_hide_no_change() -> None:
    old = figure("a", 100, 100, 101, 102, 103, unit="B")
    new = figure("a", 200, 200, 201, 202, 203, unit="B")
    assert change(old, new).verdict == "larger"
    assert change(new, old).verdict == "smaller"
    assert change(old, replace(new, samples=(*old.samples[:1], *new.samples[1:]))).verdict == "same"


def test_wide_spread_hides_a_small_change_and_raises_the_threshold() -> None:
    wide = figure("a", 4.0, 4.5, 5.0, 5.5, 6.0)
    small = change(wide, figure("a", 4.4, 4.9, 5.5, 6.0, 6.6))
    assert small.verdict == "same"
    assert small.threshold > 0.1


def test_few_samples_or_a_fallback_give_no_verdict() -> None:
    good, few = figure("a", *[1.0] * 5), figure("a", *[1.0] * 4)
    assert change(good, replace(few, samples=(2.0,) * 4)).verdict == "too few samples"
    assert change(good, replace(good, fell_back=("attention",))).verdict == "fell back"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"scope": result().scope | {"device": "cuda"}}, "scope of device: cpu and cuda"),
        ({"scope": {"words": result().scope["words"]}}, "scope of device: cpu and None"),
        ({"kind": "stages"}, "kind: e2e and stages"),
        (
            {"identity": replace(result().identity, machine=replace(MACHINE, cpu="another"))},
            "cpu: Processor and another",
        ),
    ],
)
def test_other_scopes_and_machines_are_refused_with_what_differs(other, expected: str) -> None:
    old = result(figure("a", 1.0))
    with pytest.raises(BadRequest, match="cannot be compared") as raised:
        compare_results(old, replace(old, **other))
    assert expected in str(raised.value)


def test_other_commits_and_versions_are_what_is_compared() -> None:
    old = result(figure("a", *[1.0] * 5))
    new = replace(old, identity=replace(old.identity, commit="def"), when="later")
    assert [change.verdict for change in compare_results(old, new).changes] == ["same"]


def test_no_figure_in_common_is_refused() -> None:
    with pytest.raises(BadRequest, match="no figure in common"):
        compare_results(result(figure("a", 1.0)), result(figure("b", 1.0)))


def test_the_command_fails_where_something_is_slower(tmp_path: Path) -> None:
    def written(name: str, content: Result) -> str:
        write_result(content, tmp_path / name)
        return str(tmp_path / name)

    old = written("old", result(figure("a", *noisy(1, 1.0)), figure("gone", 1.0)))
    new = written("new", result(figure("a", *noisy(2, 1.5))))
    ran = CliRunner().invoke(compare, [old, new], standalone_mode=False)
    assert ran.return_value == SOME_FAILED
    assert "slower" in ran.output
    assert "gone" in ran.output
    kept = written("kept", result(figure("a", *noisy(2, 1.0))))
    ran = CliRunner().invoke(compare, [old, kept], standalone_mode=False)
    assert ran.return_value == SOME_FAILED  # nothing slower, but one figure gone
    assert CliRunner().invoke(compare, [old, old], standalone_mode=False).return_value == 0


def test_memory_that_did_not_grow_can_be_compared_and_times_cannot_be_zero(tmp_path: Path) -> None:
    none, some = ([0.0] * 5, [1e6 + i for i in range(5)])
    before, after = figure("a", *none, unit="B"), figure("a", *some, unit="B")
    assert change(before, before).verdict == "same"
    assert change(before, after).verdict == "larger"
    assert change(after, before).verdict == "smaller"
    write_result(result(before), tmp_path / "r.json")
    assert read_result(tmp_path / "r.json").figures == (before,)
    for samples in ([0.0], [1.0, 0.0], [-1.0], []):
        write_result(result(figure("a", *samples)), tmp_path / "r.json")
        with pytest.raises(BadRequest, match="is not a results file"):
            read_result(tmp_path / "r.json")


def test_a_result_reads_back_equal(tmp_path: Path) -> None:
    kept = result(figure("a", 1.0, 2.0, flops=3.0), skipped=())
    write_result(kept, tmp_path / "r.json")
    assert read_result(tmp_path / "r.json") == kept


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ((f'"format": {FORMAT}', f'"format": {FORMAT + 1}'), "from a newer version"),
        (('"kind": "e2e"', '"kind": "soup"'), "kind"),
        (('"kind"', '"sort"'), "kind: Field required"),
        (("{", "["), "cannot read"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, edit, message: str) -> None:
    file = tmp_path / "r.json"
    write_result(result(figure("a", 1.0)), file)
    file.write_text(file.read_text().replace(*edit, 1))
    with pytest.raises(BadRequest, match=message):
        read_result(file)


COMMITTED = sorted(Path(__file__).parents[2].joinpath("bench", "results").glob("*.json"))


@pytest.mark.parametrize("file", COMMITTED, ids=[file.stem for file in COMMITTED])
def test_committed_results_are_read_and_reported(file: Path, tmp_path: Path) -> None:
    """Read files of format 1, and files converted from the formats before it."""
    committed = read_result(file)
    write_html([committed], tmp_path / "r.html")
    assert committed.identity.commit in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"### {TITLES[committed.kind]}" in markdown([committed])
