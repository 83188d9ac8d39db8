# SPDX-License-Identifier: Apache-2.0
"""A comparison of programs: one clip for equivalence, then rounds of processes in turns.

Every round starts a process of each program, which makes a clip (cold) and then more (warm).
Before the rounds, where there are several programs, each makes the clip once with its latents
kept and its frames lossless; equivalence is determined from these. On a GPU a program alone makes
it too, before several rounds: all of them then find its kernels compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from pw_bench.choices import OURS, ProgramName
from pw_bench.clips.equivalence import Output, compare_outputs
from pw_bench.e2e.aggregate import (
    Samples,
    figures_of,
    median_clips,
    operations_of,
    ratios_of,
    times_of,
)
from pw_bench.e2e.job import Job
from pw_bench.e2e.process import ProgramFailed, run_process
from pw_bench.e2e.programs import REFERENCE
from pw_bench.e2e.worker import Task
from pw_bench.measure.interruption import Interruption
from pw_bench.measure.nvml import Nvml
from pw_bench.result_sections import Clip, Equivalence, Ratio
from pw_bench.results import Figure, Skipped
from pw_runtime.errors import BadResult
from pw_runtime.system.progress import Reporter

OURS_FAILED: Final = "`pw generate`, which the programs are compared with, failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Settings of a comparison.

    Attributes:
        programs: names, ours first.
        job: for all of them.
        folder: for their videos; removed by the caller.
        rounds: processes of each program.
        warm: clips of each process after its first.
        environment: variables of the processes, besides ours.
        nvml: of the GPU that they run on, if any.
        reporter: receives progress.
    """

    programs: tuple[ProgramName, ...]
    job: Job
    folder: Path
    rounds: int
    warm: int
    environment: Mapping[str, str]
    nvml: Nvml | None
    reporter: Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Results of a comparison of programs."""

    figures: tuple[Figure, ...]
    clips: tuple[Clip, ...]
    equivalence: tuple[Equivalence, ...]
    ratios: tuple[Ratio, ...]
    skipped: tuple[Skipped, ...]
    engines: Mapping[str, str]
    operations: Mapping[str, str]
    threads: int
    interruption: Interruption


def compare_programs(session: Session) -> Measurements:
    """Run programs in turns and compare what they make.

    A program that fails at once is skipped with its last lines. One that fails later keeps its
    samples, marked, and the others go on; what was measured before a signal is kept.

    Raises BadResult where our own program makes no clip.
    """
    skipped: list[Skipped] = []
    equivalence, programs = _compare_clips(session, skipped)
    samples = {program: Samples() for program in programs}
    rejected: dict[ProgramName, Samples] = {}
    with Interruption() as interruption:
        failed = _run_rounds(session, samples, skipped)
        complete = {program: sample for program, sample in samples.items() if program not in failed}
        stable = all(figure.stable for figure in times_of(complete, {}))
        if session.rounds >= 3 and not stable:
            session.reporter.say("unstable: all programs are measured once more")
            again = {program: Samples() for program in complete}
            if not _run_rounds(session, again, skipped):  # else only the first rounds count
                samples, rejected = samples | again, complete
    samples = {program: sample for program, sample in samples.items() if sample.cold}
    interruption.require(samples)
    skipped += interruption.skipped("the remaining rounds")
    reasons = [part.reason for part in skipped if part.part == OURS]
    if reasons and OURS not in samples:
        raise BadResult(OURS_FAILED, got="; ".join(reasons))
    figures = figures_of(samples, rejected)
    return Measurements(
        figures=figures,
        clips=tuple(median_clips(samples)),
        equivalence=equivalence,
        ratios=tuple(ratios_of(samples, figures, equivalence)),
        skipped=tuple(skipped),
        engines={
            f"{program}/{network}": engine
            for program, sample in samples.items()
            for network, engine in sample.engines.items()
        },
        operations=operations_of({name: one.operations for name, one in samples.items()}),
        threads=max((sample.threads for sample in samples.values()), default=0),
        interruption=interruption,
    )


def _compare_clips(
    session: Session, skipped: list[Skipped]
) -> tuple[tuple[Equivalence, ...], list[ProgramName]]:
    """Compare every program's clip with the reference's; also return who could make it."""
    job, reporter = session.job, session.reporter
    compiles = session.rounds > 1 and torch.device(job.device).type == "cuda"
    if len(session.programs) == 1 and not compiles:
        return (), [*session.programs]
    outputs: dict[ProgramName, Output] = {}
    for program in dict.fromkeys((REFERENCE, *session.programs)):
        reporter.say(f"{program}: the clip with all its latents")
        try:
            outputs[program] = _lossless_clip(session, program)
        except ProgramFailed as error:
            if program == OURS:
                raise BadResult(OURS_FAILED, got=error) from error
            reporter.warn(f"{program} is left out: {error}")
            skipped.append(Skipped(part=program, reason=str(error)))
    reference = outputs[REFERENCE]
    equivalence = []
    for program in [program for program in outputs if program != REFERENCE]:
        reporter.say(f"{program}: its clip compared with that of {REFERENCE}")
        try:
            same = compare_outputs(outputs[program], reference, job.preset, job.precision)
            equivalence.append(same)
        except BadResult as error:
            reporter.warn(f"{program} is left out: {error}")
            skipped.append(Skipped(part=program, reason=str(error)))
            del outputs[program]
    return tuple(equivalence), [program for program in session.programs if program in outputs]


def _lossless_clip(session: Session, program: ProgramName) -> Output:
    folder = session.folder / f"{program} lossless"
    folder.mkdir()
    latents = folder / "latents.safetensors"
    job = replace(session.job, codec="ffv1")
    task = Task(program=program, job=job, folder=folder, clips=1, latents=latents)
    run_process(task, session.environment, None)
    return Output(program=program, latents=latents, video=folder / "0.mkv")


def _run_rounds(
    session: Session, samples: dict[ProgramName, Samples], skipped: list[Skipped]
) -> set[str]:
    """Add to `samples`; return which programs failed. Those are marked and not started again."""
    failed: set[str] = set()
    reporter = session.reporter
    for number in range(1, session.rounds + 1):
        for program in [program for program in samples if program not in failed]:
            folder, sample = session.folder / program, samples[program]
            folder.mkdir(exist_ok=True)
            job = replace(session.job, keep_networks=session.warm > 0)
            task = Task(program=program, job=job, folder=folder, clips=1 + session.warm)
            try:
                run = run_process(task, session.environment, session.nvml)
            except ProgramFailed as error:
                reason = f"failed in round {number}: {error}"
                reporter.warn(f"{program} is left out from here on: it {reason}")
                skipped.append(Skipped(part=program, reason=reason))
                failed.add(program)
                sample.fallbacks.add(f"it {reason}")
                if program == OURS and not sample.cold:
                    return failed  # nothing to compare with
                continue
            sample.add(run)
            walls = ", ".join(f"{clip.wall:.2f}" for clip in run.clips)
            reporter.say(f"round {number}/{session.rounds} {program}: {walls} s")
    return failed
