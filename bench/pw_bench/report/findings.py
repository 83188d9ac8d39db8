# SPDX-License-Identifier: Apache-2.0
"""What may be said of a result, and what speaks against it: the same for every form of report."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pw_bench.e2e.programs import OURS
from pw_bench.report.units import percent, quantity, times
from pw_bench.results import Ceiling, Figure, Ratio, Result
from pw_runtime.errors import BadRequest

MEMORIES = ("GPU memory", "process memory")
# Last parts of the names of end-to-end figures.
MEASURES = ("cold", "warm", *MEMORIES, "energy")
TITLES = {"kernels": "Kernels", "stages": "Stages", "e2e": "End to end"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """What is said first of a result; without statements the reasons say why there is none."""

    statements: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def line(self) -> str:
        """In one line."""
        if self.statements:
            return "; ".join(self.statements)
        return "no headline: " + ("; ".join(self.reasons) or "nothing was measured")


def require_content(results: Sequence[Result]) -> None:
    """Raises BadRequest: no result, a figure without samples, a clip that took no time."""
    if not results:
        raise BadRequest("no results to report", wanted="one file of `pw bench` or more")
    for result in results:
        for figure in result.figures:
            if not figure.samples:
                raise BadRequest(
                    f"the figure {figure.name} has no samples",
                    wanted="one or more in every figure",
                    do="measure again",
                )
        for clip in result.clips:
            if clip.wall <= 0:
                raise BadRequest(
                    f"the clip of {clip.side}, {clip.start}, took no time",
                    got=f"{clip.wall} s",
                    wanted="more than zero",
                    do="measure again",
                )


def faults(figure: Figure) -> tuple[str, ...]:
    """Why no headline is made of a figure; empty where nothing is wrong with it."""
    found = [f"fell back: {one}" for one in figure.fell_back]
    if not figure.stable:
        low, high = figure.spread
        few = len(figure.samples) < 3
        wide = percent((high - low) / figure.median) if figure.median else "not 0 %"
        why = f"{len(figure.samples)} samples" if few else f"p10 to p90 is {wide} of the median"
        found.append(f"unstable: {why.replace('1 samples', '1 sample')}")
    return tuple(found)


def parts(name: str) -> tuple[str, str, str]:
    """What a figure's name says: (group before, program, measure).

    The measure is empty where the last part is none of `MEASURES`: then the last part tells those
    apart that are compared, as the implementations of an operation.
    """
    *before, last = name.split("/")
    if last in MEASURES and before:
        return "/".join(before[:-1]), before[-1], last
    return "/".join(before), last, ""


def figures_of(result: Result, side: str, measure: str) -> list[Figure]:
    """The figures of a program and a measure, of every group."""
    return [one for one in result.figures if parts(one.name)[1:] == (side, measure)]


def label_of(result: Result, side: str) -> str | None:
    """How a program's clip differs from what it was compared with, in words."""
    for one in result.equivalence:
        if one.side == side:
            return f"{one.label} against {one.against}"
    against = [one for one in result.equivalence if one.against == side]
    return "reference clip" if against else None


def ratio_label(result: Result, ratio: Ratio) -> str:
    """How the clips of a ratio's two programs differ, from one another or from a third one's."""
    both = (ratio.side, ratio.against)
    direct = [one.label for one in result.equivalence if {one.side, one.against} == {*both}]
    if direct:
        return direct[0]
    found = {
        one.side: f"{one.side} {one.label} against {one.against}" for one in result.equivalence
    }
    return ", ".join(found.get(side, f"{side} not compared") for side in both)


def memory_of(result: Result, ratio: Ratio) -> str:
    """Which memory a ratio's share is of: the GPU's where it was measured."""
    return next((one for one in MEMORIES if figures_of(result, ratio.side, one)), MEMORIES[-1])


def ratio_faults(result: Result, ratio: Ratio, measure: str) -> list[str]:
    """What is wrong with the figures that a ratio is made of."""
    wrong = []
    for side in (ratio.side, ratio.against):
        figures = figures_of(result, side, measure)
        wrong += [] if figures else [f"there is no figure of {side}, {measure}"]
        for figure in figures:
            wrong += [f"{figure.name} {one}" for one in faults(figure)]
    return wrong


def ceilings(result: Result) -> dict[str, Ceiling]:
    """By name; all but the copy are of arithmetic."""
    found = result.ceilings
    return {
        "matrix product": found.gemm,
        "attention": found.attention,
        "convolution": found.convolution,
        "copy": found.copy,
    }


def marks(result: Result) -> dict[str, list[str]]:
    """What a reader must not overlook: a word and what it is said of."""
    found: dict[str, list[str]] = {}
    for word, why in _marks(result):
        found.setdefault(word, []).append(why)
    return found


def _marks(result: Result) -> Iterator[tuple[str, str]]:
    identity = result.identity
    if identity.dirty:
        where = f"files differed from commit {identity.commit}"
        yield "Dirty", f"{where}; these figures belong to no commit"
    for figure in result.figures:
        for fault in faults(figure):
            word, _, rest = fault.partition(": ")
            yield word.capitalize(), f"{figure.name}: {rest}"
    for name, ceiling in ceilings(result).items():
        for fault in faults(ceiling.figure):
            word, _, rest = fault.partition(": ")
            yield word.capitalize(), f"ceiling {name}: {rest}"
    for row in result.kernels:
        where = f"{row.op}, {row.size}, {row.implementation}"
        if row.same_twice is False:
            yield "Not repeatable", f"{where}: a second run gave other numbers"
        if row.finite is False:
            yield "Not finite", f"{where}: memory that was never written shows in the result"
    for package in identity.machine.packages:
        if package.broken:
            yield "Broken", f"package {package.name}: {package.broken}"
    if identity.nvml:
        yield "NVML", identity.nvml


def headline(result: Result) -> Headline:
    """Of figures that are stable and ran as asked, and of no others."""
    if not result.figures:
        return Headline(statements=(), reasons=("the result has no figures",))
    statements, reasons = [], []
    if result.kind == "e2e":
        for statement, reason in [_clips(result), *(_ratio(result, one) for one in result.ratios)]:
            statements += statement
            reasons += reason
    else:
        statements, reasons = _many(result)
    if statements and result.identity.dirty:
        statements.append("measured with uncommitted changes")
    return Headline(statements=tuple(statements), reasons=tuple(reasons))


def _clips(result: Result) -> tuple[list[str], list[str]]:
    """Times, memory and energy of our programs, by group."""
    named = [parts(one.name) for one in result.figures]
    ours = list(dict.fromkeys(one[:2] for one in named if one[2] and one[1].startswith(OURS)))
    statements, reasons = [], [] if ours else ["there is no figure of ours"]
    for group, side in ours:
        values = []
        for measure in MEASURES:
            for figure in figures_of(result, side, measure):
                wrong = faults(figure) if parts(figure.name)[0] == group else None
                reasons += [f"{figure.name} {one}" for one in wrong or ()]
                if wrong == ():
                    values.append(f"{quantity(figure.unit, figure.median)} {measure}")
        if values:
            name = f"{side}, {group}" if group else side
            statements.append(f"{name}: {', '.join(values)}")
    return statements, reasons


def _ratio(result: Result, ratio: Ratio) -> tuple[list[str], list[str]]:
    where = f"{ratio.side} against {ratio.against}"
    if ratio.refused is not None:
        return [], [f"no ratio of {where}: {ratio.refused}"]
    said, reasons = [], []
    memory = memory_of(result, ratio)
    values = {"cold": ratio.cold, "warm": ratio.warm, memory: ratio.memory}
    for measure, value in values.items():
        if value is None:
            continue
        wrong = ratio_faults(result, ratio, measure)
        reasons += [f"no {measure} ratio of {where}: {one}" for one in wrong]
        if not wrong:
            fast = f"{times(value)} as fast {measure}"
            said.append(f"{percent(value)} of its {memory}" if measure == memory else fast)
    label = ratio_label(result, ratio)
    return ([f"{where}: {', '.join(said)} (clips: {label})"] if said else []), reasons


def _many(result: Result) -> tuple[list[str], list[str]]:
    """Of kernels and stages no figure is picked: how many count, and their range."""
    good = [one for one in result.figures if not faults(one)]
    all_ = len(result.figures)
    bad = all_ - len(good)
    reasons = [f"{bad} of {all_} figures are unstable or fell back, as named below"] if bad else []
    said = [f"{len(good)} of {all_} figures are stable and ran as asked"]
    shares = [one.of_ceiling for one in good if one.of_ceiling is not None]
    shaky = [name for name, one in ceilings(result).items() if faults(one.figure)]
    if shares and shaky:
        reasons.append(f"no shares of ceilings: {', '.join(shaky)} unstable")
    elif shares:
        middle, ends = percent(statistics.median(shares)), (min(shares), max(shares))
        ends_text = " to ".join(percent(one) for one in ends)
        said.append(f"they reach {ends_text} of the measured ceilings, the median {middle}")
    refused = sum(row.refused is not None for row in result.kernels)
    if refused:
        said.append(f"{refused} of {len(result.kernels)} implementations refused to run")
    return ["; ".join(said)] if good else [], reasons
