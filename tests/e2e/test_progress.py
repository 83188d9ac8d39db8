# SPDX-License-Identifier: Apache-2.0
"""A run tells how far it is: to whoever made the reporter, on a terminal, and in a pipe."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from pw_runtime import Prompt, Reporter, Request, RunOptions, find_preset, generate, open_bundle
from pw_runtime.resume import Overrides, finish
from pw_runtime.system import progress as module
from pw_runtime.system.progress import Progress
from pw_runtime.system.stop import Stopped, StopRequest


class Watching(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.told: list[Progress] = []

    def progress(self, progress: Progress) -> None:
        self.told.append(progress)


def request_for(preset: Path, out: Path, *prompts: str, **options: object) -> Request:
    return Request(
        prompts=tuple(Prompt(text, id=text, position=i) for i, text in enumerate(prompts, 1)),
        preset=find_preset(str(preset)),
        out=out,
        options=RunOptions(device="cpu", **options),  # type: ignore[arg-type]
    )


def test_two_clips_are_told_block_by_block_from_nothing_to_all(
    bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    reporter = Watching()
    generate(request_for(preset, tmp_path, "fox", "owl"), open_bundle(bundle_dir), reporter)
    told = reporter.told
    fractions = [p.fraction for p in told]
    assert fractions[0] == 0
    assert fractions[-1] == 1
    assert all(a <= b for a, b in pairwise(fractions))
    seen = list(dict.fromkeys((p.stage, p.clip) for p in told))
    stages = ("text", "draft", "highres", "decode")
    assert seen == [(stage, clip) for stage in stages for clip in ("fox", "owl")]
    draft = {p.done for p in told if (p.stage, p.clip) == ("draft", "fox")}
    assert len(draft) > 2 * 2  # of two steps, each with blocks in two passes
    ended = [p for p in told if p.stage == "decode" and p.done == p.total]
    assert {(p.clip, p.total) for p in ended} == {("fox", 5), ("owl", 5)}


def test_stages_that_an_earlier_run_has_computed_are_no_part_of_the_run(
    bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    request, bundle = request_for(preset, tmp_path, "fox", "owl"), open_bundle(bundle_dir)
    stop = StopRequest()

    class Stopping(Watching):
        def progress(self, progress: Progress) -> None:
            if (progress.stage, progress.clip) == ("draft", "owl"):
                stop.request()

    with pytest.raises(Stopped):
        generate(request, bundle, Stopping(), stop=stop)
    reporter = Watching()
    generate(request, bundle, reporter)  # the fox has its draft
    steps = list(dict.fromkeys((p.stage, p.clip) for p in reporter.told))
    begins = steps.index(("highres", "fox"))
    assert steps[begins - 1] == ("draft", "owl")
    before = [p.fraction for p in reporter.told if p.stage == "draft"]
    after = [p.fraction for p in reporter.told if p.stage == "highres"]
    assert after[0] == pytest.approx(
        before[-1], rel=1e-9
    )  # nothing was left out when the fox went on
    assert reporter.told[-1].fraction == 1


def test_decoding_latents_of_two_runs_is_one_progress(
    bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    files, bundle = [], open_bundle(bundle_dir)
    for folder in (tmp_path / "a", tmp_path / "b"):
        request = request_for(
            preset, folder, "fox", save_latents=True, draft_only=folder.name == "b"
        )
        generate(request, bundle, Reporter(quiet=True))
        files.append(folder / "fox.latents.safetensors")
    reporter = Watching()
    outcomes = finish(files, bundle, reporter, Overrides(device="cpu"), overwrite=True)
    assert [outcome.error for outcome in outcomes] == [None, None]
    fractions = [p.fraction for p in reporter.told]
    assert {p.stage for p in reporter.told} == {"decode"}
    assert all(a <= b for a, b in pairwise(fractions))
    assert fractions[-1] == 1
    assert 1 not in fractions[: len(fractions) // 2]


def report(reporter: Reporter, fraction: float, seconds_left: float | None) -> None:
    progress = Progress(
        clip="0", stage="draft", done=1, total=2, fraction=fraction, seconds_left=seconds_left
    )
    reporter.progress(progress)


def test_lines_for_a_pipe_end_with_the_whole_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "LINE_INTERVAL", 0.0)
    reporter = Reporter()
    with reporter.steps("draft 0", 3) as advance:
        advance()
        report(reporter, 0.257, None)
        advance()
        report(reporter, 0.5, 75.4)
        advance()
    lines = capsys.readouterr().err.splitlines()
    assert "whole run" not in lines[0]
    assert lines[1].endswith("; whole run: 25 %")
    assert lines[2].startswith("draft 0: 3/3 in ")


def test_a_terminal_has_a_bar_for_the_whole_run_that_goes_when_a_stage_ends() -> None:
    reporter, screen = Reporter(), io.StringIO()
    reporter._console = Console(file=screen, force_terminal=True, width=100)
    with reporter.steps("draft 0", 2) as advance:
        advance()
        report(reporter, 0.25, 3725.0)
        assert reporter._bars is not None
        reporter._bars.refresh()
        shown = screen.getvalue()
        advance()
    assert "whole run" in shown
    assert "25 %" in shown
    assert "1:02:05" in shown
    last = screen.getvalue().rsplit("\x1b[2K", 1)[-1]  # what stays on the screen
    assert "2/2" in last
    assert "whole run" not in last


def test_a_quiet_reporter_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet=True)
    with reporter.steps("draft 0", 2) as advance:
        report(reporter, 0.5, 1.0)
        advance()
    assert capsys.readouterr() == ("", "")
