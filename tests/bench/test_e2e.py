# SPDX-License-Identifier: Apache-2.0
"""The end-to-end comparison: what it makes of its samples, and what becomes of faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pw_bench import cli_e2e
from pw_bench.cli_e2e import e2e as command
from pw_bench.cli_e2e import pick_sides
from pw_bench.e2e import run as e2e_run
from pw_bench.e2e.aggregate import figures_of, operations_of, ratios_of
from pw_bench.e2e.job import PROMPT, Job
from pw_bench.e2e.process import ProgramFailed, Samples, covered, last_words
from pw_bench.e2e.run import Taken, run_all
from pw_bench.e2e.stages import stages
from pw_bench.e2e.weights import Weights, pick_weights
from pw_bench.results import Clip, Equivalence, Result, Skipped, StepDifference, read_result
from pw_export.nano.captions import make_tokenizer
from pw_export.nano.train_draft import DIT
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.errors import BadRequest, BadResult
from pw_runtime.presets import PRESETS
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import Span
from tests.e2e.pw import write_preset

NANO = PRESETS["nano"]
JOB = Job(
    checkpoint=Path(), bundle=Path(), prompt="a", negative="", preset=NANO, noise=Path(),
    device="cpu", precision="fp32", codec="h264",
)  # fmt: skip


def clip(side: str, wall: float, start: Any = "cold", memory: int = 100) -> Clip:
    return Clip(
        side=side, start=start, wall=wall, spans=(), unattributed=0.1, unattributed_shares=(0.0,),
        host=(), peaks={"rss": memory}, predicted={},
    )  # fmt: skip


def same(side: str, label: Any) -> Equivalence:
    step = StepDifference(stage="draft", step=1, cosine=1.0, relative_l2=0.0, max_abs=0.0)
    return Equivalence(
        side=side, against="ours", label=label, limit=1e-3, steps=(step,), psnr=None, ssim=1.0,
        seam_index=None, flicker_ratio=1.0,
    )  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Taken]:
    """`run_all`, its processes replaced by `walls(side, round)`, seconds of a cold clip."""

    def go(walls: Callable[[str, int], float], label: Any = "rounding", rounds: int = 3) -> Taken:
        made: list[str] = []

        def start(task, environment, nvml, taken=None) -> list[Clip]:
            if task.latents is not None:
                walls(task.side, -1)
                return []
            made.append(task.side)
            wall = walls(task.side, made.count(task.side) - 1)
            size = 100 if task.side == "ours" else 300
            return [
                clip(task.side, wall, memory=size),
                *(clip(task.side, wall / 2, "warm", size) for _ in range(task.clips - 1)),
            ]

        monkeypatch.setattr(e2e_run, "run_process", start)
        monkeypatch.setattr(e2e_run, "compare_outputs", lambda one, *rest: same(one.side, label))
        return run_all(
            ("ours", "official"), JOB, tmp_path, rounds=rounds, warm=2, environment={},
            nvml=None, reporter=Reporter(quiet=True),
        )  # fmt: skip

    return go


def test_ratios_are_those_of_the_medians(run: Callable[..., Taken]) -> None:
    taken = run(lambda side, number: (10.0 if side == "ours" else 20.0) + 0.1 * number)
    (ratio,) = taken.ratios
    assert ratio.cold == pytest.approx(20.1 / 10.1)
    assert ratio.warm == pytest.approx(20.1 / 10.1)
    assert ratio.memory == pytest.approx(1 / 3)
    figures = {one.name: one.samples for one in taken.figures}
    assert figures["ours/cold"] == (10.0, 10.1, 10.2)
    assert figures["ours/warm"] == (5.0, 5.0, 5.05, 5.05, 5.1, 5.1)
    assert figures["official/process memory"] == (300, 300, 300)
    assert {(one.side, one.start) for one in taken.clips} == {
        (side, start) for side in ("ours", "official") for start in ("cold", "warm")
    }


def test_other_pictures_get_no_ratio(run: Callable[..., Taken]) -> None:
    (ratio,) = run(lambda side, number: 10.0, label="approximate").ratios
    assert ratio.refused == "the clip of official differs by more than rounding"
    assert (ratio.cold, ratio.warm, ratio.memory) == (None, None, None)


def test_what_fell_back_gets_no_ratio() -> None:
    samples = {side: Samples(cold=[clip(side, 1.0)]) for side in ("ours", "official")}
    samples["official"].warm = [replace(clip("official", 1.0, "warm"), joules=5.0)]
    samples["official"].fell_back = {"memory ran out"}
    figures = figures_of(samples, {})
    (ratio,) = ratios_of(samples, figures, ())
    assert ratio.refused == "official fell back: memory ran out"
    theirs = [one for one in figures if one.name.startswith("official/")]
    assert {one.name for one in theirs} >= {"official/cold", "official/energy"}
    assert all(one.fell_back == ("memory ran out",) for one in theirs)


def test_unstable_rounds_are_repeated_once_and_kept_as_rejected(run: Callable[..., Taken]) -> None:
    taken = run(lambda side, number: [10.0, 15.0, 20.0, 11.0, 16.0, 21.0][number])
    cold = taken.figures[0]
    assert cold.rejected == (10.0, 15.0, 20.0)
    assert cold.samples == (11.0, 16.0, 21.0)
    assert not cold.stable


def test_a_program_that_fails_is_left_out_with_its_last_words(run: Callable[..., Taken]) -> None:
    def walls(side: str, number: int) -> float:
        if side == "official":
            raise ProgramFailed("no such file")
        return 10.0

    taken = run(walls)
    assert taken.skipped == (Skipped(part="official", reason="no such file"),)
    assert {one.name.split("/")[0] for one in taken.figures} == {"ours"}
    assert taken.ratios == ()


def test_our_own_failure_is_an_error(run: Callable[..., Taken]) -> None:
    def walls(side: str, number: int) -> float:
        raise ProgramFailed("broken")

    with pytest.raises(BadResult, match="broken"):
        run(walls)


def test_what_was_measured_before_ctrl_c_is_kept(run: Callable[..., Taken]) -> None:
    def walls(side: str, number: int) -> float:
        if (side, number) == ("official", 1):
            raise KeyboardInterrupt
        return 10.0

    taken = run(walls)
    samples = {one.name: one.samples for one in taken.figures if one.unit == "s"}
    assert samples["ours/cold"] == (10.0, 10.0)
    assert samples["official/cold"] == (10.0,)
    assert taken.skipped == (Skipped(part="the remaining rounds", reason="interrupted"),)


def test_a_program_that_fails_later_keeps_what_it_gave_and_the_others_go_on(
    run: Callable[..., Taken],
) -> None:
    def walls(side: str, number: int) -> float:
        if (side, number) == ("official", 1):
            raise ProgramFailed("out of memory")
        return 10.0

    taken = run(walls)
    figures = {one.name: one for one in taken.figures}
    assert figures["ours/cold"].samples == (10.0, 10.0, 10.0)
    assert figures["official/cold"].samples == (10.0,)
    assert figures["official/cold"].fell_back == ("it failed in round 2: out of memory",)
    assert taken.skipped == (Skipped(part="official", reason="failed in round 2: out of memory"),)
    assert taken.ratios[0].refused is not None
    assert not any(one.rejected for one in taken.figures)  # its few samples repeat nothing


def test_a_failure_of_the_repeated_rounds_leaves_the_first_ones(run: Callable[..., Taken]) -> None:
    def walls(side: str, number: int) -> float:
        if (side, number) == ("ours", 3):
            raise ProgramFailed("out of memory")
        return 10.0 + 5 * number

    cold = run(walls).figures[0]
    assert (cold.samples, cold.rejected) == ((10.0, 15.0, 20.0), ())


def test_ctrl_c_in_the_repeated_rounds_leaves_the_first_ones(run: Callable[..., Taken]) -> None:
    def walls(side: str, number: int) -> float:
        if number == 4:
            raise KeyboardInterrupt
        return 10.0 + 5 * number

    cold = run(walls).figures[0]
    assert (cold.samples, cold.rejected) == ((10.0, 15.0, 20.0), ())


def test_our_own_failure_in_the_first_round_is_an_error(run: Callable[..., Taken]) -> None:
    def walls(side: str, number: int) -> float:
        if number == 0:
            raise ProgramFailed("broken")
        return 10.0

    with pytest.raises(BadResult, match="broken"):
        run(walls)


def test_implementations_are_told_by_program_where_they_differ() -> None:
    samples = {
        "ours": Samples(operations={"attention": "reference", "dup_up_add": "reference"}),
        "ours-cudnn": Samples(operations={"attention": "cudnn", "dup_up_add": "reference"}),
        "official": Samples(),
    }
    assert operations_of(samples) == {
        "attention": "reference (ours); cudnn (ours-cudnn)",
        "dup_up_add": "reference",
    }


def test_the_last_words_are_a_whole_error_and_a_killed_program_is_said_to_be_killed() -> None:
    assert last_words(1, "a warning\nValueError: no\n") == "ValueError: no"
    error = "Traceback:\n  File\nBadRequest: no model\n  got: a\n  do this: b\n"
    assert last_words(1, error) == "BadRequest: no model; got: a; do this: b"
    assert last_words(1, "") == "exit code 1"
    assert last_words(-9, "a warning\n").startswith("killed by SIGKILL")


def test_only_outer_spans_of_the_main_thread_cover_time() -> None:
    def one(start: float, end: float, depth: int = 0, thread: str = "MainThread") -> Span:
        return Span(name="a", start=start, end=end, depth=depth, thread=thread)

    assert covered([one(0, 2), one(1, 2, depth=1), one(5, 6), one(2, 5, thread="other")]) == 3


def test_programs_that_cannot_take_part_are_skipped_or_refused() -> None:
    cpu = torch.device("cpu")
    files = Weights(name="a", checkpoint=Path(), bundle=Path(), digest="")
    skipped: list[Skipped] = []
    assert pick_sides((), NANO, files, cpu, skipped) == ("ours", "official")
    reasons = {one.part: one.reason for one in skipped}
    assert reasons["ours-triton"] == "it needs a CUDA GPU"
    assert "no high-res stage" in reasons["diffusers"]
    with pytest.raises(BadRequest, match="add --draft-only"):
        pick_sides(("diffusers",), NANO, files, cpu, [])
    memory = replace(files, in_memory=True)
    assert pick_sides((), NANO, memory, cpu, []) == ("ours",)
    with pytest.raises(BadRequest, match=r"from files.*\n.*leave --side ours-engines out"):
        pick_sides(("ours-engines",), NANO, memory, cpu, [])


def test_without_the_package_that_compares_frames_nothing_is_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli_e2e, "find_spec", lambda name: None)
    files, cpu = Weights(name="a", checkpoint=Path(), bundle=Path(), digest=""), torch.device("cpu")
    with pytest.raises(BadRequest, match=r"pip install '.\[bench\]'"):
        pick_sides(("official",), NANO, files, cpu, [])
    assert pick_sides(("ours",), NANO, files, cpu, []) == ("ours",)


def test_engines_are_built_for_the_device_and_precision_that_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(cli_e2e.subprocess, "run", run)
    job = replace(JOB, precision="bf16")
    cli_e2e.build_engines(job, tmp_path, Reporter(quiet=True))
    assert commands[0][-4:] == ["--device", "cpu", "--precision", "bf16"]


def test_weights_come_unasked_for_the_built_in_presets_alone(tmp_path: Path) -> None:
    options = {"checkpoint": None, "synthetic": None, "preset": "2k"}
    with pytest.raises(BadRequest, match="no weights"):
        pick_weights(options, tmp_path, print)
    with pytest.raises(BadRequest, match="two kinds"):
        pick_weights(options | {"checkpoint": tmp_path, "synthetic": "nano"}, tmp_path, print)
    assert pick_weights(options | {"synthetic": "5b"}, tmp_path, print).in_memory
    built_in = pick_weights(options | {"preset": "nano"}, tmp_path, print)
    assert open_bundle(built_in.bundle).networks.draft.config == DIT  # that was trained


def test_the_usual_prompt_is_in_words_that_the_built_in_model_knows() -> None:
    assert "<unk>" not in make_tokenizer().encode(PROMPT).tokens  # a run that says so "fell back"


def test_a_folder_that_is_not_there_is_refused_before_anything_runs(tmp_path: Path) -> None:
    out = str(tmp_path / "no" / "r.json")
    for verb in (command, stages):
        ran = CliRunner().invoke(verb, ["--preset", "nano", "--out", out])
        assert isinstance(ran.exception, BadRequest)
        assert "mkdir -p" in str(ran.exception)


@pytest.mark.slow
def test_ours_beside_the_official_recipe(tmp_path: Path) -> None:
    preset, out = write_preset(tmp_path / "small.toml"), tmp_path / "r.json"
    ran = CliRunner().invoke(
        command,
        f"--preset {preset} --synthetic nano --rounds 1 --warm 1 --out {out}".split(),
        catch_exceptions=False,
    )
    assert ran.exit_code == 0, ran.output
    result: Result = read_result(out)
    (equal,) = result.equivalence
    assert equal.label == "rounding"
    (ratio,) = result.ratios
    assert ratio.refused is None
    assert {one.name for one in result.figures} == {
        f"{side}/{what}"
        for side in ("ours", "official")
        for what in ("cold", "warm", "process memory")
    }
    for one in result.clips:
        assert one.peaks["rss"] >= max(size for _, size in one.host)
        assert one.wall > 0
        assert 0 <= one.unattributed < 0.1 * one.wall
    assert result.identity.operations["attention"] == "reference"
    assert result.identity.libraries["FFmpeg"]
    assert {path.name for path in tmp_path.iterdir()} == {"small.toml", "r.json"}


@pytest.mark.slow
def test_stages_of_clips(tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "small.toml")
    out = tmp_path / "r.json"
    ran = CliRunner().invoke(
        stages,
        f"--preset {preset} --synthetic nano --clips 2 --steps 2 --out {out}".split(),
        catch_exceptions=False,
    )
    assert ran.exit_code == 0, ran.output
    figures = {one.name: one for one in read_result(out).figures}
    assert len(figures["draft step"].samples) == len(figures["highres step"].samples) == 4
    assert len(figures["first chunk"].samples) == 2
    for name in ("draft step", "highres step", "first chunk", "chunk"):
        assert figures[name].flops
        assert figures[name].of_ceiling
    assert {"text", "condition", "load vae", "pack", "encode", "mux"} <= figures.keys()
