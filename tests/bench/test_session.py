# SPDX-License-Identifier: Apache-2.0
"""A comparison of programs: what its samples become, and what becomes of failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pw_bench.e2e import session as module
from pw_bench.e2e.aggregate import Samples, figures_of, operations_of, ratios_of
from pw_bench.e2e.process import ProcessRun, ProgramFailed
from pw_bench.e2e.session import Measurements, Session, compare_programs
from pw_bench.e2e.worker import Task
from pw_bench.result_sections import Clip, Equivalence, StepDifference
from pw_bench.results import Skipped
from pw_runtime.cli.main import Terminated
from pw_runtime.errors import BadResult
from pw_runtime.system.progress import Reporter
from tests.bench.programs import NO_JOB

Seconds = Callable[[str, int], float]
"""Program and round (-1: the lossless clip) -> seconds of a cold clip."""


def clip(program: str, wall: float, start: Any = "cold", memory: int = 100) -> Clip:
    return Clip(
        side=program, start=start, wall=wall, spans=(), unattributed=0.1,
        unattributed_shares=(0.0,), host=(), peaks={"rss": memory}, predicted={},
    )  # fmt: skip


def same(program: str, label: Any) -> Equivalence:
    step = StepDifference(stage="draft", step=1, cosine=1.0, relative_l2=0.0, max_abs=0.0)
    return Equivalence(
        side=program, against="ours", label=label, limit=1e-3, steps=(step,), psnr=None, ssim=1.0,
        seam_index=None, flicker_ratio=1.0,
    )  # fmt: skip


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Measurements]:
    """Return `compare_programs` with its processes replaced by a function of seconds."""

    def run(
        seconds: Seconds, label: Any = "rounding", rounds: int = 3, **changes: Any
    ) -> Measurements:
        started: list[str] = []

        def run_process(task: Task, environment: object, nvml: object) -> ProcessRun:
            if task.latents is not None:
                seconds(task.program, -1)
                return ProcessRun(clips=())
            started.append(task.program)
            wall = seconds(task.program, started.count(task.program) - 1)
            size = 100 if task.program == "ours" else 300
            warm = clip(task.program, wall / 2, "warm", size)
            cold = clip(task.program, wall, memory=size)
            return ProcessRun(clips=(cold, *[warm] * (task.clips - 1)))

        monkeypatch.setattr(module, "run_process", run_process)
        monkeypatch.setattr(
            module, "compare_outputs", lambda output, *_: same(output.program, label)
        )
        session = Session(
            programs=("ours", "official"), job=NO_JOB, folder=tmp_path, rounds=rounds, warm=2,
            environment={}, nvml=None, reporter=Reporter(quiet=True),
        )  # fmt: skip
        return compare_programs(replace(session, **changes))

    return run


def test_ratios_are_those_of_the_medians(compare: Callable[..., Measurements]) -> None:
    measured = compare(lambda name, number: (10.0 if name == "ours" else 20.0) + 0.1 * number)
    (ratio,) = measured.ratios
    assert ratio.cold == pytest.approx(20.1 / 10.1)
    assert ratio.warm == pytest.approx(20.1 / 10.1)
    assert ratio.memory == pytest.approx(1 / 3)
    figures = {figure.name: figure.samples for figure in measured.figures}
    assert figures["ours/cold"] == (10.0, 10.1, 10.2)
    assert figures["ours/warm"] == (5.0, 5.0, 5.05, 5.05, 5.1, 5.1)
    assert figures["official/process memory"] == (300, 300, 300)
    assert {(clip.side, clip.start) for clip in measured.clips} == {
        (program, start) for program in ("ours", "official") for start in ("cold", "warm")
    }


def test_clips_that_differ_by_more_than_rounding_get_no_ratio(
    compare: Callable[..., Measurements],
) -> None:
    (ratio,) = compare(lambda name, number: 10.0, label="approximate").ratios
    assert ratio.refused == "the clip of official differs by more than rounding"
    assert (ratio.cold, ratio.warm, ratio.memory) == (None, None, None)


def test_program_that_fell_back_gets_no_ratio() -> None:
    samples = {name: Samples(cold=[clip(name, 1.0)]) for name in ("ours", "official")}
    samples["official"].warm = [replace(clip("official", 1.0, "warm"), joules=5.0)]
    samples["official"].fallbacks = {"out of memory"}
    figures = figures_of(samples, {})
    (ratio,) = ratios_of(samples, figures, ())
    assert ratio.refused == "official fell back: out of memory"
    theirs = [figure for figure in figures if figure.name.startswith("official/")]
    assert {figure.name for figure in theirs} >= {"official/cold", "official/energy"}
    assert all(figure.fell_back == ("out of memory",) for figure in theirs)


def test_fallbacks_of_every_process_are_kept() -> None:
    samples = Samples()
    for fallbacks in (("a",), (), ("b", "a")):
        samples.add(ProcessRun(clips=(clip("ours", 1.0),), fallbacks=fallbacks, threads=3))
    assert samples.fell_back == ("a", "b")
    assert (len(samples.cold), samples.threads) == (3, 3)


def test_unstable_rounds_are_repeated_once_and_kept_as_rejected(
    compare: Callable[..., Measurements],
) -> None:
    measured = compare(lambda name, number: [10.0, 15.0, 20.0, 11.0, 16.0, 21.0][number])
    cold = measured.figures[0]
    assert cold.rejected == (10.0, 15.0, 20.0)
    assert cold.samples == (11.0, 16.0, 21.0)
    assert not cold.stable


def test_program_that_fails_is_left_out_with_its_reason(
    compare: Callable[..., Measurements],
) -> None:
    def seconds(program: str, number: int) -> float:
        if program == "official":
            raise ProgramFailed("no such file")
        return 10.0

    measured = compare(seconds)
    assert measured.skipped == (Skipped(part="official", reason="no such file"),)
    assert {figure.name.split("/")[0] for figure in measured.figures} == {"ours"}
    assert measured.ratios == ()


@pytest.mark.parametrize("number", [-1, 0], ids=["lossless clip", "first round"])
def test_our_own_failure_is_an_error(compare: Callable[..., Measurements], number: int) -> None:
    def seconds(program: str, started: int) -> float:
        if started == number:
            raise ProgramFailed("broken")
        return 10.0

    with pytest.raises(BadResult, match="broken"):
        compare(seconds)


@pytest.mark.parametrize("signal", [KeyboardInterrupt(), Terminated(15)])
def test_samples_before_a_signal_are_kept(
    compare: Callable[..., Measurements], signal: BaseException
) -> None:
    def seconds(program: str, number: int) -> float:
        if (program, number) == ("official", 1):
            raise signal
        return 10.0

    measured = compare(seconds)
    samples = {figure.name: figure.samples for figure in measured.figures if figure.unit == "s"}
    assert samples["ours/cold"] == (10.0, 10.0)
    assert samples["official/cold"] == (10.0,)
    assert measured.skipped == (Skipped(part="the remaining rounds", reason="interrupted"),)
    assert measured.interruption.cause is signal


def test_a_signal_before_any_sample_ends_the_measurement(
    compare: Callable[..., Measurements],
) -> None:
    def seconds(program: str, number: int) -> float:
        if number == 0:
            raise KeyboardInterrupt
        return 10.0

    with pytest.raises(KeyboardInterrupt):
        compare(seconds)


@pytest.mark.parametrize(
    ("device", "rounds", "untimed"), [("cuda", 3, 1), ("cuda", 1, 0), ("cpu", 3, 0)]
)
def test_a_program_alone_compiles_on_a_gpu_before_it_is_timed(
    compare: Callable[..., Measurements], device: str, rounds: int, untimed: int
) -> None:
    """Seen: the first of its cold clips compiled the kernels of all the others."""
    numbers: list[int] = []

    def seconds(program: str, number: int) -> float:
        numbers.append(number)
        return 10.0

    job = replace(NO_JOB, device=device)
    measured = compare(seconds, rounds=rounds, programs=("ours",), job=job)
    assert numbers == [-1] * untimed + [*range(rounds)]
    assert len(measured.figures[0].samples) == rounds
    assert measured.equivalence == ()


def test_program_that_fails_later_keeps_its_samples_and_the_others_go_on(
    compare: Callable[..., Measurements],
) -> None:
    def seconds(program: str, number: int) -> float:
        if (program, number) == ("official", 1):
            raise ProgramFailed("out of memory")
        return 10.0

    measured = compare(seconds)
    figures = {figure.name: figure for figure in measured.figures}
    assert figures["ours/cold"].samples == (10.0, 10.0, 10.0)
    assert figures["official/cold"].samples == (10.0,)
    assert figures["official/cold"].fell_back == ("it failed in round 2: out of memory",)
    reason = "failed in round 2: out of memory"
    assert measured.skipped == (Skipped(part="official", reason=reason),)
    assert measured.ratios[0].refused is not None
    assert not any(figure.rejected for figure in measured.figures)  # its few samples repeat nothing


@pytest.mark.parametrize("error", [ProgramFailed("out of memory"), KeyboardInterrupt()])
def test_repeated_rounds_that_do_not_end_leave_the_first_ones(
    compare: Callable[..., Measurements], error: BaseException
) -> None:
    def seconds(program: str, number: int) -> float:
        if (program, number) == ("ours", 4):
            raise error
        return 10.0 + 5 * number

    cold = compare(seconds).figures[0]
    assert (cold.samples, cold.rejected) == ((10.0, 15.0, 20.0), ())


def test_implementations_are_listed_by_program_where_they_differ() -> None:
    operations = {
        "ours": {"attention": "reference", "dup_up_add": "reference"},
        "ours-cudnn": {"attention": "cudnn", "dup_up_add": "reference"},
        "official": {},
    }
    assert operations_of(operations) == {
        "attention": "reference (ours); cudnn (ours-cudnn)",
        "dup_up_add": "reference",
    }
