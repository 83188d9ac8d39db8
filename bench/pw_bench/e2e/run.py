# SPDX-License-Identifier: Apache-2.0
"""End to end: prompt in, closed video on disk, by this runtime and by others in turns.

    pw bench e2e --preset nano --out FILE

Every round starts a process of each program, which makes a clip (cold) and then more (warm). Before
them, where there are several, each makes the clip once with its latents kept and frames lossless,
which is what equivalence is told from. The weights were written just before: they are in the page
cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pw_bench.clips.equivalence import Output, compare_outputs
from pw_bench.e2e.aggregate import figures_of, median_clips, operations_of, ratios_of, times_of
from pw_bench.e2e.job import Job
from pw_bench.e2e.process import ProgramFailed, Samples, run_process
from pw_bench.e2e.programs import EXACT, OURS
from pw_bench.e2e.worker import Task
from pw_bench.measure.nvml import Nvml
from pw_bench.results import Clip, Equivalence, Figure, Ratio, Skipped
from pw_runtime.errors import BadResult
from pw_runtime.system.progress import Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """All that a comparison of programs gives."""

    figures: tuple[Figure, ...]
    clips: tuple[Clip, ...]
    equivalence: tuple[Equivalence, ...]
    ratios: tuple[Ratio, ...]
    skipped: tuple[Skipped, ...]
    engines: dict[str, str]
    operations: dict[str, str]
    threads: int


def run_all(
    sides: Sequence[str],
    job: Job,
    folder: Path,
    *,
    rounds: int,
    warm: int,
    environment: dict[str, str],
    nvml: Nvml | None,
    reporter: Reporter,
) -> Taken:
    """Run programs in turns and compare what they gave.

    A program that fails at once is skipped with its last words. One that fails later keeps what it
    gave, marked, and the others go on; what was measured before Ctrl-C is kept.

    Args:
        sides: names of programs, ours first.
        job: for all of them.
        folder: for their videos; removed by the caller.
        rounds: processes of each program.
        warm: clips of each process after its first.
        environment: of the processes, besides ours.
        nvml: of the GPU that they run on, if they do.
        reporter: told about progress.

    Raises BadResult where our own program makes no clip.
    """
    skipped: list[Skipped] = []
    equivalence, alive = _equivalence(sides, job, folder, environment, reporter, skipped)
    samples = {side: Samples() for side in alive}
    rejected: dict[str, Samples] = {}

    def failed(taken: dict[str, Samples]) -> set[str]:
        return _rounds(taken, job, folder, rounds, warm, environment, nvml, reporter, skipped)

    try:
        bad = failed(samples)
        whole = {side: one for side, one in samples.items() if side not in bad}
        if rounds >= 3 and any(not one.stable for one in times_of(whole, {})):
            reporter.say("unstable: all programs are measured once more")
            again = {side: Samples() for side in whole}
            if not failed(again):  # else the first rounds are all there is
                samples, rejected = samples | again, whole
    except KeyboardInterrupt:
        reporter.warn("interrupted: what was measured until now is kept")
        skipped.append(Skipped(part="the remaining rounds", reason="interrupted"))
    samples = {side: one for side, one in samples.items() if one.cold}
    reasons = [one.reason for one in skipped if one.part == OURS]
    if reasons and OURS not in samples:
        raise BadResult("our own program failed", got="; ".join(reasons))
    figures = figures_of(samples, rejected)
    return Taken(
        figures=figures,
        clips=tuple(median_clips(samples)),
        equivalence=equivalence,
        ratios=tuple(ratios_of(samples, figures, equivalence)),
        skipped=tuple(skipped),
        engines={f"{s}/{net}": on for s, one in samples.items() for net, on in one.engines.items()},
        operations=operations_of(samples),
        threads=max((one.threads for one in samples.values()), default=0),
    )


def _equivalence(
    sides: Sequence[str],
    job: Job,
    folder: Path,
    environment: dict[str, str],
    reporter: Reporter,
    skipped: list[Skipped],
) -> tuple[tuple[Equivalence, ...], list[str]]:
    """Compare every program's clip with the exact one's; those that could make it."""
    if len(sides) == 1:
        return (), [*sides]
    lossless = replace(job, codec="ffv1")
    outputs: dict[str, Output] = {}
    for side in dict.fromkeys((EXACT, *sides)):
        place = folder / f"{side} lossless"
        place.mkdir()
        latents = place / "latents.safetensors"
        task = Task(side=side, job=lossless, folder=place, clips=1, latents=latents)
        reporter.say(f"{side}: the clip with all its latents")
        try:
            run_process(task, environment, None)
        except ProgramFailed as error:
            if side == OURS:
                raise BadResult("our own program failed", got=error) from error
            reporter.warn(f"{side} is left out: {error}")
            skipped.append(Skipped(part=side, reason=str(error)))
            continue
        outputs[side] = Output(side=side, latents=latents, video=place / "0.mkv")
    found = []
    for side in [side for side in outputs if side != EXACT]:
        reporter.say(f"{side}: its clip beside that of {EXACT}")
        try:
            output = outputs[side]
            found.append(compare_outputs(output, outputs[EXACT], job.preset, job.precision))
        except BadResult as error:
            reporter.warn(f"{side} is left out: {error}")
            skipped.append(Skipped(part=side, reason=str(error)))
            del outputs[side]
    return tuple(found), [side for side in sides if side in outputs]


def _rounds(
    samples: dict[str, Samples],
    job: Job,
    folder: Path,
    rounds: int,
    warm: int,
    environment: dict[str, str],
    nvml: Nvml | None,
    reporter: Reporter,
    skipped: list[Skipped],
) -> set[str]:
    """Add to `samples`; which programs failed. Those are marked and not started again."""
    failed: set[str] = set()
    for number in range(rounds):
        for side in [side for side in samples if side not in failed]:
            place, taken = folder / side, samples[side]
            place.mkdir(exist_ok=True)
            task = Task(side=side, job=job, folder=place, clips=1 + warm)
            try:
                clips = run_process(task, environment, nvml, taken)
            except ProgramFailed as error:
                reporter.warn(f"{side} failed in round {number + 1} and is left out: {error}")
                skipped.append(Skipped(part=side, reason=f"failed in round {number + 1}: {error}"))
                failed.add(side)
                taken.fell_back.add(f"it failed in round {number + 1}: {error}")
                if side == OURS and not taken.cold:
                    return failed  # nothing to compare with
                continue
            taken.cold.append(clips[0])
            taken.warm += clips[1:]
            walls = ", ".join(f"{clip.wall:.2f}" for clip in clips)
            reporter.say(f"round {number + 1}/{rounds} {side}: {walls} s")
    return failed
