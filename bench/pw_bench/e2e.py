# SPDX-License-Identifier: Apache-2.0
"""End to end: prompt in, closed video on disk, by this runtime and by others in turns.

    pw bench e2e --preset nano --out FILE

Every round starts a process of each program, which makes a clip (cold) and then more (warm). Before
them, where there are several, each makes the clip once with its latents kept and frames lossless,
which is what equivalence is told from. The weights were written just before: they are in the page
cache.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter

from pw_bench.child import MAIN, Made, Task
from pw_bench.equivalence import Output, compare_outputs
from pw_bench.job import Job
from pw_bench.nvml import Nvml
from pw_bench.programs import EXACT, OURS
from pw_bench.results import Clip, Equivalence, Figure, Ratio, Skipped
from pw_bench.watching import Watch, between
from pw_runtime.errors import BadResult
from pw_runtime.progress import Reporter
from pw_runtime.trace import Span

_TASK, _MADE = TypeAdapter(Task), TypeAdapter(Made)


class ProgramFailed(Exception):
    """A program ended without the clips it was asked for; its last words."""


@dataclass(slots=True)
class Samples:
    """What one program gave so far, cold and warm."""

    cold: list[Clip] = field(default_factory=list)
    warm: list[Clip] = field(default_factory=list)
    fell_back: set[str] = field(default_factory=set)
    engines: dict[str, str] = field(default_factory=dict)
    operations: dict[str, str] = field(default_factory=dict)
    threads: int = 0


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
        if rounds >= 3 and any(not one.stable for one in _times(whole, {})):
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
    figures = _figures(samples, rejected)
    return Taken(
        figures=figures,
        clips=tuple(_median_clips(samples)),
        equivalence=equivalence,
        ratios=tuple(_ratios(samples, figures, equivalence)),
        skipped=tuple(skipped),
        engines={f"{s}/{net}": on for s, one in samples.items() for net, on in one.engines.items()},
        operations=_operations(samples),
        threads=max((one.threads for one in samples.values()), default=0),
    )


def _operations(samples: dict[str, Samples]) -> dict[str, str]:
    """Operation -> implementation, with the programs that ran it where they differ."""
    names = sorted({name for one in samples.values() for name in one.operations})
    found = {}
    for name in names:
        by: dict[str, list[str]] = {}
        for side, one in samples.items():
            if name in one.operations:
                by.setdefault(one.operations[name], []).append(side)
        said = [f"{implementation} ({', '.join(sides)})" for implementation, sides in by.items()]
        found[name] = "; ".join(said) if len(by) > 1 else next(iter(by))
    return found


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
            _start(task, environment, None)
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
                clips = _start(task, environment, nvml, taken)
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


def _start(
    task: Task, environment: dict[str, str], nvml: Nvml | None, taken: Samples | None = None
) -> list[Clip]:
    """Run a process of a program and watch it. Raises ProgramFailed."""
    for old in task.folder.iterdir():
        old.unlink()
    # The same for all: with spinning threads every program is slower wherever others run too.
    settings = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **environment}
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "pw_bench.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=settings,
        text=True,
    )
    try:
        with Watch(child.pid, nvml) as watch:
            out, errors = child.communicate(_TASK.dump_json(task).decode())
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode != 0:
        raise ProgramFailed(_last_words(child.returncode, errors))
    made = [_MADE.validate_json(line) for line in out.splitlines()]
    if taken is not None:
        taken.fell_back.update(text for one in made for text in one.fell_back)
        taken.engines, taken.threads = made[0].engines, made[0].threads
        taken.operations = made[0].operations
    return [_clip(task.side, one, watch, None if i else started) for i, one in enumerate(made)]


def _last_words(code: int, errors: str) -> str:
    """Why a process ended: its last line and what is indented below it, as in our errors. One that
    was killed says nothing of it itself."""
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"killed by {name}{memory}"
    lines = errors.rstrip().splitlines() or [f"exit code {code}"]
    first = max((i for i, line in enumerate(lines) if line[:1].strip()), default=0)
    return "; ".join(line.strip() for line in lines[first:])


def _clip(side: str, made: Made, watch: Watch, started: float | None) -> Clip:
    """One clip's account; `started` is when its process was, of the first one."""
    spans = made.spans
    start = made.start
    if started is not None:
        start = started
        process = Span(name="process start", start=started, end=made.start, depth=0, thread=MAIN)
        spans = (process, *spans)
    wall = made.end - start
    unattributed = wall - covered(spans)
    # Also before our runtime's first stage, when it starts the counter again.
    rss = [size for t, size in watch.host if start <= t <= made.end]
    pss = [size for t, size in watch.pss if start <= t <= made.end]
    nvml = [size for t, size in watch.device if start <= t <= made.end]
    return Clip(
        side=side,
        start="warm" if started is None else "cold",
        wall=wall,
        spans=tuple(replace(s, start=s.start - start, end=s.end - start) for s in spans),
        unattributed=unattributed,
        unattributed_shares=(unattributed / wall,),
        host=between(watch.host, start, made.end),
        device=between(watch.device, start, made.end),
        peaks=made.peaks
        | {"rss": max([made.peaks["rss"], *rss])}
        | ({"pss": max(pss)} if pss else {})
        | ({"nvml": max(nvml)} if nvml else {}),
        predicted=made.predicted,
        joules=made.joules,
        disk_bytes=made.disk_bytes,
    )


def covered(spans: Iterable[Span]) -> float:
    """Seconds in which the main thread was in a span."""
    return sum(one.end - one.start for one in spans if one.depth == 0 and one.thread == MAIN)


def _times(samples: dict[str, Samples], rejected: dict[str, Samples]) -> Iterator[Figure]:
    for side, one in samples.items():
        before = rejected.get(side, Samples())
        starts = {"cold": (one.cold, before.cold), "warm": (one.warm, before.warm)}
        for start, (clips, first) in starts.items():
            if clips:
                yield Figure(
                    name=f"{side}/{start}",
                    unit="s",
                    samples=tuple(clip.wall for clip in clips),
                    rejected=tuple(clip.wall for clip in first),
                    fell_back=tuple(sorted(one.fell_back)),
                )


def _figures(samples: dict[str, Samples], rejected: dict[str, Samples]) -> tuple[Figure, ...]:
    """Times, and peaks of memory over the first clip of each process."""
    found = [*_times(samples, rejected)]
    names = {"rss": "process memory", "allocator": "GPU memory"}
    for side, one in samples.items():
        for counter, name in names.items():
            peaks = tuple(clip.peaks[counter] for clip in one.cold if counter in clip.peaks)
            if peaks:
                fell_back = tuple(sorted(one.fell_back))
                found.append(
                    Figure(name=f"{side}/{name}", unit="B", samples=peaks, fell_back=fell_back)
                )
        joules = tuple(clip.joules for clip in one.warm if clip.joules is not None)
        if joules:
            fell_back = tuple(sorted(one.fell_back))
            found.append(
                Figure(name=f"{side}/energy", unit="J", samples=joules, fell_back=fell_back)
            )
    return tuple(found)


def _median_clips(samples: dict[str, Samples]) -> Iterator[Clip]:
    """Of each side and start, the clip of median time, with the shares of all of them."""
    for one in samples.values():
        for clips in (one.cold, one.warm):
            if clips:
                middle = sorted(clips, key=lambda clip: clip.wall)[len(clips) // 2]
                shares = tuple(clip.unattributed / clip.wall for clip in clips)
                yield replace(middle, unattributed_shares=shares)


def _ratios(
    samples: dict[str, Samples],
    figures: tuple[Figure, ...],
    equivalence: tuple[Equivalence, ...],
) -> Iterator[Ratio]:
    """Ours against every other, where their clips are the same to rounding and none fell back."""
    by_name = {figure.name: figure for figure in figures}
    labels = {one.side: one.label for one in equivalence}
    ours = [side for side in samples if side.startswith(OURS)]
    for side in ours:
        for other in samples:
            if other in ours:
                continue
            wrong = [s for s in (side, other) if labels.get(s) == "approximate"]
            fallen = [s for s in (side, other) if samples[s].fell_back]
            if wrong or fallen:
                why = f"the clip of {wrong[0]} differs by more than rounding" if wrong else ""
                why = why or f"{fallen[0]} fell back: {'; '.join(samples[fallen[0]].fell_back)}"
                yield Ratio(side=side, against=other, refused=why)
                continue

            def times(start: str, side: str = side, other: str = other) -> float | None:
                mine, theirs = (by_name.get(f"{s}/{start}") for s in (side, other))
                return theirs.median / mine.median if mine and theirs else None

            memory = "GPU memory" if f"{side}/GPU memory" in by_name else "process memory"
            more = times(memory)
            yield Ratio(
                side=side,
                against=other,
                cold=times("cold"),
                warm=times("warm"),
                memory=None if more is None else 1 / more,
            )
