# SPDX-License-Identifier: Apache-2.0
"""What of a result is a table, in HTML and in Markdown alike."""

from __future__ import annotations

from dataclasses import dataclass

from pw_bench.report import findings
from pw_bench.report.findings import TITLES, faults, label_of, ratio_faults, ratio_label
from pw_bench.report.units import cosine, percent, quantity, scale_of, small, times
from pw_bench.results import Clip, Equivalence, Figure, KernelRow, Ratio, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Text by rows; `numbers` are the columns that are aligned to the right."""

    columns: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    rows: tuple[tuple[str, ...], ...]


def clip_titles(result: Result) -> list[str]:
    """Program and start of each clip, counted where there are several of both."""
    names = [f"{one.side}, {one.start}" for one in result.clips]
    return [
        f"{name}, run {names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def figures_table(result: Result) -> Table:
    """Every figure with what is wrong with it and how its clip differs."""
    return Table(
        columns=("figure", "median", "p10", "p90", "samples", "of ceiling", "remarks"),
        numbers=(1, 2, 3, 4, 5),
        rows=tuple(_figure(result, one) for one in result.figures),
    )


def _figure(result: Result, figure: Figure) -> tuple[str, ...]:
    low, high = figure.spread
    scale = scale_of(figure.unit, [low, figure.median, high])
    side = figure.name.split("/")[-2] if "/" in figure.name else figure.name
    label = label_of(result, side) if result.kind == "e2e" else None
    return (
        figure.name,
        scale(figure.median),
        scale(low),
        scale(high),
        str(len(figure.samples)),
        "" if figure.of_ceiling is None else percent(figure.of_ceiling),
        "; ".join([*faults(figure), *([label] if label else [])]),
    )


def equivalence_table(result: Result) -> Table:
    """One row for each comparison of two clips; steps are apart."""
    return Table(
        columns=(
            *("clip of", "against", "difference", "last latent, rel. L2", "limit of rounding"),
            *("PSNR", "SSIM", "seam index", "flicker ratio"),
        ),
        numbers=(3, 4, 5, 6, 7, 8),
        rows=tuple(_equivalence(one) for one in result.equivalence),
    )


def _equivalence(one: Equivalence) -> tuple[str, ...]:
    return (
        one.side,
        one.against,
        one.label,
        small(one.steps[-1].relative_l2) if one.steps else "not taken",
        small(one.limit),
        "no byte differs" if one.psnr is None else f"{one.psnr:.1f} dB",
        f"{one.ssim:.5f}",
        "no tiles" if one.seam_index is None else f"{one.seam_index:.3f}",
        "still" if one.flicker_ratio is None else f"{one.flicker_ratio:.3f}",
    )


def steps_table(one: Equivalence) -> Table:
    """The latent after every step."""
    return Table(
        columns=("stage", "step", "cosine", "relative L2", "largest difference"),
        numbers=(1, 2, 3, 4),
        rows=tuple(
            (
                step.stage,
                str(step.step),
                cosine(step.cosine),
                small(step.relative_l2),
                small(step.max_abs),
            )
            for step in one.steps
        ),
    )


def ratios_table(result: Result) -> Table:
    """How many times as fast, or why that is not said."""
    return Table(
        columns=("program", "against", "cold", "warm", "memory", "difference", "remarks"),
        numbers=(2, 3, 4),
        rows=tuple(_ratio(result, one) for one in result.ratios),
    )


def _ratio(result: Result, one: Ratio) -> tuple[str, ...]:
    remarks = [] if one.refused is None else [f"refused: {one.refused}"]
    memory = findings.memory_of(result, one)
    for measure, value in (("cold", one.cold), ("warm", one.warm), (memory, one.memory)):
        if value is not None:
            remarks += ratio_faults(result, one, measure)
    return (
        one.side,
        one.against,
        "none" if one.cold is None else times(one.cold),
        "none" if one.warm is None else times(one.warm),
        "none" if one.memory is None else percent(one.memory),
        ratio_label(result, one),
        "; ".join(dict.fromkeys(remarks)),
    )


def kernels_table(result: Result) -> Table:
    """Time, rate and exactness of every implementation, and which ones refused."""
    known = {one.name: one for one in result.figures}
    return Table(
        columns=(
            *("operation", "size", "by", "median", "p10", "p90", "samples", "rate"),
            *("of ceiling", "error", "to baseline", "same twice", "remarks"),
        ),
        numbers=(3, 4, 5, 6, 7, 8, 9, 10),
        rows=tuple(_kernel(one, known.get(one.figure)) for one in result.kernels),
    )


def _kernel(row: KernelRow, figure: Figure | None) -> tuple[str, ...]:
    timed = ("", "", "", "")
    share, remarks = None, list[str]()
    if figure is not None:
        low, high = figure.spread
        scale = scale_of("s", [low, figure.median, high])
        timed = (scale(figure.median), scale(low), scale(high), str(len(figure.samples)))
        share, remarks = figure.of_ceiling, [*faults(figure)]
    remarks += ["memory never written shows"] if row.finite is False else []
    remarks += [f"refused: {row.refused}"] if row.refused is not None else []
    remarks += ["not timed"] if figure is None and row.refused is None else []
    return (
        row.op,
        row.size,
        row.implementation,
        *timed,
        "" if row.rate is None else rate(row.rate, row.bound),
        "" if share is None else percent(share),
        "" if row.error is None else small(row.error),
        "" if row.error_ratio is None else f"{row.error_ratio:.2f}",
        {None: "", True: "yes", False: "no"}[row.same_twice],
        "; ".join(remarks),
    )


def rate(value: float, bound: str) -> str:
    """A rate by what bounds it."""
    return quantity("FLOP/s" if bound == "flops" else "B/s", value)


def ceilings_table(result: Result) -> Table:
    """The measured rates that shares refer to."""
    rows = []
    for name, one in findings.ceilings(result).items():
        low, high = one.figure.spread
        scale = scale_of("s", [low, one.figure.median, high])
        timed = (scale(one.figure.median), scale(low), scale(high), str(len(one.figure.samples)))
        shown = rate(one.rate, "bytes" if name == "copy" else "flops")
        rows.append((name, one.work, shown, *timed, "; ".join(faults(one.figure))))
    return Table(
        columns=("ceiling", "work", "rate", "median", "p10", "p90", "samples", "remarks"),
        numbers=(2, 3, 4, 5, 6),
        rows=tuple(rows),
    )


def peaks_table(result: Result) -> Table:
    """Most memory by what counted it, the plan's prediction, energy and disk."""
    counted = list(dict.fromkeys(name for one in result.clips for name in one.peaks))
    planned = list(
        dict.fromkeys(p for one in result.clips for by in one.predicted.values() for p in by)
    )
    plans = [f"plan, {place}" for place in planned]
    energy = ["GPU energy"] if any(one.joules is not None for one in result.clips) else []
    columns = ("clip", *counted, *plans, "disk written", *energy)

    def row(title: str, one: Clip) -> tuple[str, ...]:
        most = [max((by.get(p, 0) for by in one.predicted.values()), default=0) for p in planned]
        return (
            title,
            *(quantity("B", one.peaks[n]) if n in one.peaks else "" for n in counted),
            *(quantity("B", size) if size else "" for size in most),
            "" if one.disk_bytes is None else quantity("B", one.disk_bytes),
            *("" if one.joules is None else quantity("J", one.joules) for _ in energy),
        )

    rows = tuple(row(*both) for both in zip(clip_titles(result), result.clips, strict=True))
    return Table(columns=columns, numbers=tuple(range(1, len(columns))), rows=rows)


def overview_table(result: Result) -> Table:
    """Kind, time, commit and scope."""
    dirty = " (dirty: files differed)" if result.identity.dirty else ""
    scope = tuple((name, value) for name, value in result.scope.items())
    rows = (
        ("kind", TITLES[result.kind]),
        ("measured", result.when),
        ("commit", result.identity.commit + dirty),
        *scope,
        ("to repeat", result.command),
    )
    return Table(columns=("", ""), rows=rows)
