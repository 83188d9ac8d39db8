# SPDX-License-Identifier: Apache-2.0
"""Statements that a result supports, and what weakens them: the same for every form of report."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, get_args

from pw_bench.choices import OURS
from pw_bench.report.units import percent, quantity, times
from pw_bench.result_sections import Label, Ratio
from pw_bench.results import Ceiling, Figure, Kind, Result
from pw_runtime.errors import BadRequest

MEMORIES = ("GPU memory", "process memory")
# Last parts of figure names that are a measure of the program named before them.
MEASURES = ("cold", "warm", "time", "CPU time", *MEMORIES, "tensors", "energy")
SPEEDS: Final[Mapping[str, str]] = {
    "cold": "as fast cold",
    "warm": "as fast warm",
    "time": "as fast",
    "CPU time": "as fast in CPU time",
}
TITLES: Final[Mapping[Kind, str]] = {
    "kernels": "Kernels",
    "stages": "Stages",
    "e2e": "End to end",
    "dit-peers": "Transformer beside diffusers",
    "vae-peers": "Decoder beside diffusers",
    "generate-memory": "Memory of whole clips",
    "decoder-memory": "Memory of the decoder",
    "quality": "Quality of the built-in model",
    "linear-error": "Errors of quantized linear layers",
    "sparse-error": "Errors of block-sparse attention",
    "cpu-conv": "Our C++ for CPUs beside oneDNN",
    "ranks": "One clip by several processes",
    "approximations": "Approximations beside the exact path",
    "serve": "A server under load",
    "kills": "Runs that were killed and went on",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """First lines about a result; without statements, the reasons why there are none."""

    statements: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def line(self) -> str:
        """The headline in one line."""
        if self.statements:
            return "; ".join(self.statements)
        return "no headline: " + ("; ".join(self.reasons) or "nothing was measured")


def require_content(results: Sequence[Result]) -> None:
    """Raise BadRequest for no results, a figure without samples, a clip that took no time."""
    if not results:
        raise BadRequest("no results to report", wanted="one or more files of `pw bench`")
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
    """Return the reasons why a figure makes no headline; empty where nothing is wrong with it."""
    reasons = [f"fell back: {fallback}" for fallback in figure.fell_back]
    if not figure.stable:
        low, high = figure.spread
        few = len(figure.samples) < 3
        wide = percent((high - low) / figure.median) if figure.median else "not 0 %"
        why = f"{len(figure.samples)} samples" if few else f"p10 to p90 is {wide} of the median"
        reasons.append(f"unstable: {why.replace('1 samples', '1 sample')}")
    return tuple(reasons)


def split_name(name: str) -> tuple[str, str, str]:
    """Split a figure's name into (group, program, measure).

    The measure is empty where the last part is none of `MEASURES`: then the last part tells apart
    what is compared, for instance the implementations of an operation.
    """
    *before, last = name.split("/")
    if last in MEASURES and before:
        return "/".join(before[:-1]), before[-1], last
    return "/".join(before), last, ""


def figures_of(result: Result, program: str, measure: str) -> list[Figure]:
    """Return the figures of a program and a measure, in every group."""
    return [f for f in result.figures if split_name(f.name)[1:] == (program, measure)]


def label_of(result: Result, program: str) -> str | None:
    """Describe how a program's clip differs from the clip it was compared with."""
    for same in result.equivalence:
        if same.side == program:
            return f"{same.label} against {same.against}"
    is_reference = any(same.against == program for same in result.equivalence)
    return "reference clip" if is_reference else None


def ratio_label(result: Result, ratio: Ratio) -> str:
    """Describe how the outputs of a ratio's programs differ, from each other or from a third."""
    pair = {ratio.side, ratio.against}
    for difference in result.differences:
        if {difference.side, difference.against} == pair:
            if difference.share == 0:
                return "equal bit for bit"
            return f"differ by at most {difference.max_abs:.2g} ({difference.unit})"
    direct = [s.label for s in result.equivalence if {s.side, s.against} == pair]
    if direct:
        return max(direct, key=get_args(Label).index)  # of several clips, that of the worst
    labels = {s.side: f"{s.side} {s.label} against {s.against}" for s in result.equivalence}
    return ", ".join(
        labels.get(program, f"{program} not compared") for program in (ratio.side, ratio.against)
    )


def ratio_values(result: Result, ratio: Ratio) -> dict[str, float]:
    """Return the values of a ratio by measure: speed-ups, then shares of memory."""
    memory = next((m for m in MEMORIES if figures_of(result, ratio.side, m)), MEMORIES[-1])
    values = {
        "cold": ratio.cold,
        "warm": ratio.warm,
        "time": ratio.time,
        "CPU time": ratio.cpu_time,
        memory: ratio.memory,
        "tensors": ratio.tensors,
    }
    return {measure: value for measure, value in values.items() if value is not None}


def describe_value(measure: str, value: float) -> str:
    """Return one value of a ratio in words."""
    if measure in SPEEDS:
        return f"{times(value)} {SPEEDS[measure]}"
    return f"{percent(value)} of its {measure}"


def ratio_faults(result: Result, ratio: Ratio, measure: str) -> list[str]:
    """Return what is wrong with the figures behind a ratio."""
    reasons = []
    for program in (ratio.side, ratio.against):
        figures = figures_of(result, program, measure)
        reasons += [] if figures else [f"there is no figure of {program}, {measure}"]
        for figure in figures:
            reasons += [f"{figure.name} {fault}" for fault in faults(figure)]
    return reasons


def ceilings(result: Result) -> dict[str, Ceiling]:
    """Return the measured ceilings by name; all but the copy are of arithmetic."""
    measured = result.ceilings
    if measured is None:
        return {}
    return {
        "matrix product": measured.gemm,
        "attention": measured.attention,
        "convolution": measured.convolution,
        "copy": measured.copy,
    }


def warnings(result: Result) -> dict[str, list[str]]:
    """Return what a reader must not overlook: a keyword and the items it applies to."""
    by_keyword: dict[str, list[str]] = {}
    for keyword, item in _warnings(result):
        by_keyword.setdefault(keyword, []).append(item)
    return by_keyword


def _warnings(result: Result) -> Iterator[tuple[str, str]]:
    identity = result.identity
    if identity.dirty:
        where = f"files differed from commit {identity.commit}"
        yield "Dirty", f"{where}; these figures belong to no commit"
    for figure in result.figures:
        for fault in faults(figure):
            keyword, _, rest = fault.partition(": ")
            yield keyword.capitalize(), f"{figure.name}: {rest}"
    for name, ceiling in ceilings(result).items():
        for fault in faults(ceiling.figure):
            keyword, _, rest = fault.partition(": ")
            yield keyword.capitalize(), f"ceiling {name}: {rest}"
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
    """Return statements about figures that are stable and ran as requested, and no others."""
    if not result.figures:
        return Headline(statements=(), reasons=("the result has no figures",))
    describe = _clip_statements if result.kind == "e2e" else _summary
    statements, reasons = describe(result)
    for ratio in result.ratios:
        statement, reason = _ratio_statement(result, ratio)
        statements += statement
        reasons += reason
    if statements and result.identity.dirty:
        statements.append("measured with uncommitted changes")
    return Headline(statements=tuple(statements), reasons=tuple(reasons))


def _clip_statements(result: Result) -> tuple[list[str], list[str]]:
    """Return times, memory and energy of our programs, by group."""
    names = [split_name(figure.name) for figure in result.figures]
    ours = list(dict.fromkeys(name[:2] for name in names if name[2] and name[1].startswith(OURS)))
    statements, reasons = [], [] if ours else ["there is no figure of ours"]
    for group, program in ours:
        values = []
        for measure in MEASURES:
            for figure in figures_of(result, program, measure):
                if split_name(figure.name)[0] != group:
                    continue
                reasons += [f"{figure.name} {fault}" for fault in faults(figure)]
                if not faults(figure):
                    values.append(f"{quantity(figure.unit, figure.median)} {measure}")
        if values:
            name = f"{program}, {group}" if group else program
            statements.append(f"{name}: {', '.join(values)}")
    return statements, reasons


def _ratio_statement(result: Result, ratio: Ratio) -> tuple[list[str], list[str]]:
    where = f"{ratio.side} against {ratio.against}"
    if ratio.refused is not None:
        return [], [f"no ratio of {where}: {ratio.refused}"]
    values, reasons = [], []
    for measure, value in ratio_values(result, ratio).items():
        wrong = ratio_faults(result, ratio, measure)
        reasons += [f"no {measure} ratio of {where}: {reason}" for reason in wrong]
        if not wrong:
            values.append(describe_value(measure, value))
    outputs = "clips" if result.kind == "e2e" else "outputs"
    label = f"({outputs}: {ratio_label(result, ratio)})"
    return ([f"{where}: {', '.join(values)} {label}"] if values else []), reasons


def _summary(result: Result) -> tuple[list[str], list[str]]:
    """Return how many figures count, and their range: no single figure is picked."""
    good = [figure for figure in result.figures if not faults(figure)]
    total = len(result.figures)
    bad = total - len(good)
    reasons = [f"{bad} of {total} figures are unstable or fell back, as named below"] if bad else []
    parts = [f"{len(good)} of {total} figures are stable and ran as requested"]
    shares = [figure.of_ceiling for figure in good if figure.of_ceiling is not None]
    shaky = [name for name, ceiling in ceilings(result).items() if faults(ceiling.figure)]
    if shares and shaky:
        reasons.append(f"no shares of ceilings: {', '.join(shaky)} unstable")
    elif shares:
        ends = f"{percent(min(shares))} to {percent(max(shares))}"
        median = percent(statistics.median(shares))
        parts.append(f"they reach {ends} of the measured ceilings, the median {median}")
    refused = sum(row.refused is not None for row in result.kernels)
    if refused:
        parts.append(f"{refused} of {len(result.kernels)} implementations refused to run")
    return ["; ".join(parts)] if good else [], reasons
