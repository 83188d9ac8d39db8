# SPDX-License-Identifier: Apache-2.0
"""`pw bench kills`: what it counts of runs that are killed and go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pw_bench.kills import run as kills_run
from pw_bench.kills.program import KillTask
from pw_bench.kills.run import _costs, _killed, _Life, _ratio
from pw_bench.report import markdown
from pw_bench.report.findings import headline
from pw_bench.report.tables import kills_tables
from pw_bench.result_sections import Kills
from pw_bench.results import Figure, read_result
from pw_runtime.cli.bench_kills import kills as command
from pw_runtime.cli.exit_codes import DONE, SOME_FAILED
from pw_runtime.errors import BadResult
from pw_runtime.presets import PRESETS
from tests.bench.small_results import result

ENDED = {"wall": 2.0, "cpu": 1.0, "failed": []}


def life(*told: object) -> _Life:
    """A process that told these things before it ended or was killed."""
    heard = _Life()
    for line in told:
        heard.hear(json.dumps(line))
    return heard


def test_steps_that_were_taken_over_are_told_from_those_computed() -> None:
    begun = life(["0", "draft", 0.0], ["0", "draft", 3.0], ["0", "draft", 3.25])
    assert begun.begun == {("0", "draft"): 3.0}
    assert begun.reached == {("0", "draft"): 3.25}
    assert begun.ended is None
    anew = life(["0", "draft", 0.0], ["0", "draft", 0.25], ["0", "draft", 1.5], ENDED)
    assert anew.begun == {("0", "draft"): 0.0}
    assert anew.ended == ENDED


def test_frames_that_were_taken_over_are_told_from_the_first_one() -> None:
    taken = life(["0", "decode", 0.0], ["0", "decode", 9.0], ["0", "decode", 13.0])
    assert taken.begun == {("0", "decode"): 9.0}
    anew = life(["0", "decode", 0.0], ["0", "decode", 1.0], ["0", "decode", 5.0])
    assert anew.begun == {("0", "decode"): 0.0}


@pytest.fixture
def task(tmp_path: Path) -> KillTask:
    return KillTask(model=tmp_path, preset=PRESETS["nano"], prompts=("a",), out=tmp_path / "out")


def lives(task: KillTask, *each: _Life, content: str) -> Callable[[KillTask, float], _Life]:
    """Processes one after another; those that end leave a video and its receipt."""
    left = iter(each)

    def live(_: KillTask, limit: float) -> _Life:
        made = next(left)
        if made.ended is not None:
            task.out.mkdir(exist_ok=True)
            (task.out / "0.mp4").write_text(content)
            (task.out / "0.json").write_text(json.dumps({"seed": 1, "seconds": limit}))
        return made

    return live


def test_kills_files_and_what_was_computed_again_are_counted(
    task: KillTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task.out.mkdir()
    (task.out / "0.mp4").write_text("pixels")
    (task.out / "0.json").write_text('{"seed": 1, "seconds": 5}')
    whole = kills_run._finished(task)
    each = (
        life(["0", "draft", 0.0], ENDED),  # how long a whole run takes
        life(["0", "draft", 0.0], ["0", "draft", 2.5]),
        life(),
        life(["0", "draft", 0.0], ["0", "draft", 2.0], ["0", "decode", 1.0], ENDED),
    )
    monkeypatch.setattr(kills_run, "_live", lives(task, *each, content="pixels"))
    table = _killed(task, whole, 2, 0, lambda line: None)
    assert (table.kills, table.processes, table.batches, table.files) == (2, 3, 1, 2)
    assert table.altered == ()
    assert table.killed_in == {"draft": 1, "start": 1}
    assert table.again == {"draft": (0.5,)}
    ended, again = kills_tables(table)
    assert ended.rows == (("2", "3", "1", "2", "2"),)
    assert again.rows == (
        ("start", "1", "steps", "0", "", ""),
        ("draft", "1", "steps", "1", "0.50", "0.50"),
    )


def test_a_file_that_differs_is_named_and_a_failure_ends_the_measurement(
    task: KillTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task.out.mkdir()
    (task.out / "0.mp4").write_text("pixels")
    (task.out / "0.json").write_text('{"seed": 1, "seconds": 5}')
    whole = kills_run._finished(task)
    monkeypatch.setattr(kills_run, "_seconds", lambda *_: 1.0)
    other = (life(), life(ENDED))
    monkeypatch.setattr(kills_run, "_live", lives(task, *other, content="other pixels"))
    assert _killed(task, whole, 1, 0, lambda line: None).altered == ("0.mp4",)
    failed = (life(), life({**ENDED, "failed": ["out of memory"]}))
    monkeypatch.setattr(kills_run, "_live", lives(task, *failed, content="pixels"))
    with pytest.raises(BadResult, match="out of memory"):
        _killed(task, whole, 1, 0, lambda line: None)


def table(*altered: str) -> Kills:
    return Kills(
        kills=2, processes=3, batches=1, files=2, altered=altered, killed_in={"draft": 2},
        again={"draft": (0.5,)},
    )  # fmt: skip


def test_the_cost_of_the_journal_is_the_ratio_of_its_figures(
    task: KillTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: figures under other names than the ratio's, which therefore never made a headline."""
    monkeypatch.setattr(kills_run, "_live", lambda *_: replace(life(ENDED), seconds=3.0))
    costs = _costs(task, tmp_path, 3, lambda line: None)
    figures = tuple(Figure(name=name, unit="s", samples=tuple(x)) for name, x in costs.items())
    assert len(figures) == 6
    found = replace(result(), kind="kills", figures=figures, ratios=(_ratio(costs),))
    assert headline(found).reasons == ()
    assert any("with journal against without journal" in x for x in headline(found).statements)


def test_the_tables_of_kills_are_in_the_markdown() -> None:
    found = replace(result(), kind="kills", kills=table("0.mp4"))
    assert "| kills | processes | batches, all complete |" in markdown([found])


@pytest.mark.parametrize(("altered", "code"), [((), DONE), (("0.mp4",), SOME_FAILED)])
def test_a_file_that_differs_makes_the_command_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, altered: tuple[str, ...], code: int
) -> None:
    found = replace(result(), kind="kills", kills=table(*altered))
    monkeypatch.setattr(kills_run, "measure_kills", lambda *_, **__: found)
    arguments = ["--preset", "nano", "--out", str(tmp_path / "r.json")]
    ended = CliRunner().invoke(command, arguments, standalone_mode=False, catch_exceptions=False)
    assert ended.return_value == code
    assert read_result(tmp_path / "r.json").kills == table(*altered)
