# SPDX-License-Identifier: Apache-2.0
"""What the samples of several programs come to: figures, clips of median time, ratios."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pw_bench.e2e.process import Samples
from pw_bench.e2e.programs import OURS
from pw_bench.results import Clip, Equivalence, Figure, Ratio


def times_of(samples: dict[str, Samples], rejected: dict[str, Samples]) -> Iterator[Figure]:
    """Seconds of cold and of warm clips; `rejected` are those of a first, unstable time."""
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


def figures_of(samples: dict[str, Samples], rejected: dict[str, Samples]) -> tuple[Figure, ...]:
    """Times, and peaks of memory over the first clip of each process."""
    found = [*times_of(samples, rejected)]
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


def median_clips(samples: dict[str, Samples]) -> Iterator[Clip]:
    """Of each side and start, the clip of median time, with the shares of all of them."""
    for one in samples.values():
        for clips in (one.cold, one.warm):
            if clips:
                middle = sorted(clips, key=lambda clip: clip.wall)[len(clips) // 2]
                shares = tuple(clip.unattributed / clip.wall for clip in clips)
                yield replace(middle, unattributed_shares=shares)


def ratios_of(
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


def operations_of(samples: dict[str, Samples]) -> dict[str, str]:
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
