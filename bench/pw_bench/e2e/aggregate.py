# SPDX-License-Identifier: Apache-2.0
"""Aggregates of several programs' samples: figures, clips of median time, ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from pw_bench.choices import OURS, ProgramName
from pw_bench.e2e.process import ProcessRun
from pw_bench.result_sections import Clip, Equivalence, Ratio
from pw_bench.results import Figure


@dataclass(slots=True)
class Samples:
    """Clips of one program so far, cold and warm."""

    cold: list[Clip] = field(default_factory=list)
    warm: list[Clip] = field(default_factory=list)
    fallbacks: set[str] = field(default_factory=set)
    engines: Mapping[str, str] = field(default_factory=dict)
    operations: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0

    def add(self, run: ProcessRun) -> None:
        """Add the clips of one process."""
        self.cold.append(run.clips[0])
        self.warm += run.clips[1:]
        self.fallbacks.update(run.fallbacks)
        self.engines, self.operations, self.threads = run.engines, run.operations, run.threads

    @property
    def fell_back(self) -> tuple[str, ...]:
        """All fallbacks, in order of the alphabet."""
        return tuple(sorted(self.fallbacks))


ByProgram = Mapping[ProgramName, Samples]


def times_of(samples: ByProgram, rejected: ByProgram) -> Iterator[Figure]:
    """Yield seconds of cold and warm clips; `rejected` are those of a first, unstable series."""
    for program, sample in samples.items():
        before = rejected.get(program, Samples())
        starts = {"cold": (sample.cold, before.cold), "warm": (sample.warm, before.warm)}
        for start, (clips, first) in starts.items():
            if clips:
                yield Figure(
                    name=f"{program}/{start}",
                    unit="s",
                    samples=tuple(clip.wall for clip in clips),
                    rejected=tuple(clip.wall for clip in first),
                    fell_back=sample.fell_back,
                )


def figures_of(samples: ByProgram, rejected: ByProgram) -> tuple[Figure, ...]:
    """Return times, peak memory of the first clip of each process, and energy of warm clips."""
    figures = [*times_of(samples, rejected)]
    for program, sample in samples.items():
        fell_back = sample.fell_back
        for counter, name in (("rss", "process memory"), ("allocator", "GPU memory")):
            peaks = tuple(clip.peaks[counter] for clip in sample.cold if counter in clip.peaks)
            if peaks:
                name = f"{program}/{name}"
                figures.append(Figure(name=name, unit="B", samples=peaks, fell_back=fell_back))
        joules = tuple(clip.joules for clip in sample.warm if clip.joules is not None)
        if joules:
            name = f"{program}/energy"
            figures.append(Figure(name=name, unit="J", samples=joules, fell_back=fell_back))
    return tuple(figures)


def median_clips(samples: ByProgram) -> Iterator[Clip]:
    """Yield the clip of median time for each program and start, with the shares of all clips."""
    for sample in samples.values():
        for clips in (sample.cold, sample.warm):
            if clips:
                median = sorted(clips, key=lambda clip: clip.wall)[len(clips) // 2]
                shares = tuple(clip.unattributed / clip.wall for clip in clips)
                yield replace(median, unattributed_shares=shares)


def ratios_of(
    samples: ByProgram,
    figures: tuple[Figure, ...],
    equivalence: tuple[Equivalence, ...],
) -> Iterator[Ratio]:
    """Yield ours against every other program, or why there is no ratio.

    There is none where the clips differ by more than rounding, or a program fell back.
    """
    medians = {figure.name: figure.median for figure in figures}
    labels = {same.side: same.label for same in equivalence}
    ours = [program for program in samples if program.startswith(OURS)]
    for program in ours:
        for other in samples:
            if other in ours:
                continue
            pair = (program, other)
            refused = _refusal(pair, labels, samples)
            if refused is not None:
                yield Ratio(side=program, against=other, refused=refused)
                continue
            memory = "GPU memory" if f"{program}/GPU memory" in medians else "process memory"
            share = _quotient(medians, memory, pair)
            yield Ratio(
                side=program,
                against=other,
                cold=_quotient(medians, "cold", pair[::-1]),
                warm=_quotient(medians, "warm", pair[::-1]),
                memory=share,
            )


def _refusal(
    pair: tuple[ProgramName, ProgramName], labels: Mapping[str, str], samples: ByProgram
) -> str | None:
    for program in pair:
        if labels.get(program) == "approximate":
            return f"the clip of {program} differs by more than rounding"
    for program in pair:
        if samples[program].fallbacks:
            return f"{program} fell back: {'; '.join(samples[program].fell_back)}"
    return None


def _quotient(medians: Mapping[str, float], measure: str, pair: tuple[str, str]) -> float | None:
    a, b = (medians.get(f"{program}/{measure}") for program in pair)
    return None if a is None or b is None else a / b


def operations_of(by_program: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return operation -> implementation, with the programs that ran it where they differ."""
    names = sorted({name for chosen in by_program.values() for name in chosen})
    operations = {}
    for name in names:
        programs: dict[str, list[str]] = {}
        for program, chosen in by_program.items():
            if name in chosen:
                programs.setdefault(chosen[name], []).append(program)
        texts = [f"{implementation} ({', '.join(ran)})" for implementation, ran in programs.items()]
        operations[name] = "; ".join(texts) if len(programs) > 1 else next(iter(programs))
    return operations
