# SPDX-License-Identifier: Apache-2.0
"""Tables of a result, the same in HTML and in Markdown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from pw_bench.report import findings
from pw_bench.report.findings import TITLES, faults, label_of, ratio_faults, ratio_label
from pw_bench.report.units import cosine, percent, quantity, scale_of, small, times
from pw_bench.result_sections import (
    Clip,
    Equivalence,
    KernelRow,
    Kills,
    OutputDifference,
    Quality,
    Ratio,
)
from pw_bench.results import Figure, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Text by rows; `numbers` are the columns aligned to the right."""

    columns: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    rows: tuple[tuple[str, ...], ...]


def overview_table(result: Result) -> Table:
    """Return kind, time, commit and scope."""
    dirty = " (dirty: files differed)" if result.identity.dirty else ""
    rows = (
        ("kind", TITLES[result.kind]),
        ("measured", result.when),
        ("commit", result.identity.commit + dirty),
        *result.scope.items(),
        ("to repeat", result.command),
    )
    return Table(columns=("", ""), rows=rows)


def figures_table(result: Result) -> Table:
    """Return every figure with what is wrong with it and how its clip differs."""
    return Table(
        columns=("figure", "median", "p10", "p90", "samples", "of ceiling", "remarks"),
        numbers=(1, 2, 3, 4, 5),
        rows=tuple(_figure(result, figure) for figure in result.figures),
    )


def _figure(result: Result, figure: Figure) -> tuple[str, ...]:
    low, high = figure.spread
    scale = scale_of(figure.unit, [low, figure.median, high])
    program = figure.name.split("/")[-2] if "/" in figure.name else figure.name
    label = label_of(result, program) if result.kind == "e2e" else None
    return (
        figure.name,
        scale(figure.median),
        scale(low),
        scale(high),
        str(len(figure.samples)),
        "" if figure.of_ceiling is None else percent(figure.of_ceiling),
        "; ".join([*faults(figure), *([label] if label else [])]),
    )


def ratios_table(result: Result) -> Table:
    """Return speed-ups and shares of memory, or why there are none."""
    measures = ("cold", "warm") if result.kind == "e2e" else ("time", "CPU time")
    shares = ("memory",) if result.kind == "e2e" else ("memory", "tensors")
    columns = ("program", "against", *measures, *shares, "difference", "remarks")
    return Table(
        columns=columns,
        numbers=tuple(range(2, len(columns) - 2)),
        rows=tuple(_ratio(result, ratio, measures, shares) for ratio in result.ratios),
    )


def _ratio(
    result: Result, ratio: Ratio, measures: tuple[str, ...], shares: tuple[str, ...]
) -> tuple[str, ...]:
    remarks = [] if ratio.refused is None else [f"refused: {ratio.refused}"]
    values = findings.ratio_values(result, ratio)
    for measure in values:
        remarks += ratio_faults(result, ratio, measure)
    speed = {measure: times(value) for measure, value in values.items()}
    sizes = {"memory": ratio.memory, "tensors": ratio.tensors}
    memory = {name: percent(value) for name, value in sizes.items() if value is not None}
    return (
        ratio.side,
        ratio.against,
        *(speed.get(measure, "none") for measure in measures),
        *(memory.get(share, "none") for share in shares),
        ratio_label(result, ratio),
        "; ".join(dict.fromkeys(remarks)),
    )


def equivalence_table(result: Result) -> Table:
    """Return one row for each comparison of two clips; their steps have a table of their own."""
    return Table(
        columns=(
            *("clip of", "against", "difference", "last latent, rel. L2", "limit of rounding"),
            *("PSNR", "SSIM", "seam index", "flicker ratio"),
        ),
        numbers=(3, 4, 5, 6, 7, 8),
        rows=tuple(_equivalence(same) for same in result.equivalence),
    )


def _equivalence(same: Equivalence) -> tuple[str, ...]:
    return (
        same.side,
        same.against,
        same.label,
        small(same.steps[-1].relative_l2) if same.steps else "not recorded",
        small(same.limit),
        "no byte differs" if same.psnr is None else f"{same.psnr:.1f} dB",
        f"{same.ssim:.5f}",
        "no tiles" if same.seam_index is None else f"{same.seam_index:.3f}",
        "static" if same.flicker_ratio is None else f"{same.flicker_ratio:.3f}",
    )


def steps_table(same: Equivalence) -> Table:
    """Return the difference of the latent after every step."""
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
            for step in same.steps
        ),
    )


def differences_table(result: Result) -> Table:
    """Return how far the programs' tensors differ."""
    return Table(
        columns=("output of", "against", "largest difference", "relative L2", "values that differ"),
        numbers=(2, 3, 4),
        rows=tuple(_difference(difference) for difference in result.differences),
    )


def _difference(difference: OutputDifference) -> tuple[str, ...]:
    l2, share = difference.relative_l2, difference.share
    return (
        difference.side,
        difference.against,
        f"{difference.max_abs:.2g} ({difference.unit})",
        "" if l2 is None else small(l2),
        "" if share is None else f"{100 * share:.2g} %",
    )


def kernels_table(result: Result) -> Table:
    """Return time, rate and exactness of every implementation, and which ones refused."""
    figures = {figure.name: figure for figure in result.figures}
    return Table(
        columns=(
            *("operation", "size", "by", "median", "p10", "p90", "samples", "rate"),
            *("of ceiling", "error", "to baseline", "same twice", "remarks"),
        ),
        numbers=(3, 4, 5, 6, 7, 8, 9, 10),
        rows=tuple(_kernel(row, figures.get(row.figure)) for row in result.kernels),
    )


def _kernel(row: KernelRow, figure: Figure | None) -> tuple[str, ...]:
    times_ = ("", "", "", "")
    share, remarks = None, list[str]()
    if figure is not None:
        times_ = _time_cells(figure)
        share, remarks = figure.of_ceiling, [*faults(figure)]
    remarks += ["unwritten memory shows"] if row.finite is False else []
    remarks += [f"refused: {row.refused}"] if row.refused is not None else []
    remarks += ["not timed"] if figure is None and row.refused is None else []
    return (
        row.op,
        row.size,
        row.implementation,
        *times_,
        "" if row.rate is None else rate(row.rate, row.bound),
        "" if share is None else percent(share),
        "" if row.error is None else small(row.error),
        "" if row.error_ratio is None else f"{row.error_ratio:.2f}",
        {None: "", True: "yes", False: "no"}[row.same_twice],
        "; ".join(remarks),
    )


def _time_cells(figure: Figure) -> tuple[str, str, str, str]:
    """Return median, p10, p90 and the number of samples."""
    low, high = figure.spread
    scale = scale_of("s", [low, figure.median, high])
    return scale(figure.median), scale(low), scale(high), str(len(figure.samples))


def rate(value: float, bound: str) -> str:
    """Format a rate in the unit of what bounds it."""
    return quantity("FLOP/s" if bound == "flops" else "B/s", value)


def ceilings_table(result: Result) -> Table:
    """Return the measured rates that shares refer to."""
    rows = []
    for name, ceiling in findings.ceilings(result).items():
        speed = rate(ceiling.rate, "bytes" if name == "copy" else "flops")
        figure = ceiling.figure
        rows.append((name, ceiling.work, speed, *_time_cells(figure), "; ".join(faults(figure))))
    return Table(
        columns=("ceiling", "work", "rate", "median", "p10", "p90", "samples", "remarks"),
        numbers=(2, 3, 4, 5, 6),
        rows=tuple(rows),
    )


def clip_titles(result: Result) -> list[str]:
    """Return program and start of each clip, numbered where there are several of both."""
    names = [f"{clip.side}, {clip.start}" for clip in result.clips]
    return [
        f"{name}, run {names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def peaks_table(result: Result) -> Table:
    """Return peak memory by counter, the plan's prediction, energy and disk."""
    counters = list(dict.fromkeys(name for clip in result.clips for name in clip.peaks))
    places = list(
        dict.fromkeys(
            p for clip in result.clips for sizes in clip.predicted.values() for p in sizes
        )
    )
    plans = [f"plan, {place}" for place in places]
    energy = ["GPU energy"] if any(clip.joules is not None for clip in result.clips) else []
    columns = ("clip", *counters, *plans, "disk written", *energy)

    def row(title: str, clip: Clip) -> tuple[str, ...]:
        most = [max((s.get(p, 0) for s in clip.predicted.values()), default=0) for p in places]
        return (
            title,
            *(quantity("B", clip.peaks[n]) if n in clip.peaks else "" for n in counters),
            *(quantity("B", size) if size else "" for size in most),
            "" if clip.disk_bytes is None else quantity("B", clip.disk_bytes),
            *("" if clip.joules is None else quantity("J", clip.joules) for _ in energy),
        )

    rows = tuple(row(*pair) for pair in zip(clip_titles(result), result.clips, strict=True))
    return Table(columns=columns, numbers=tuple(range(1, len(columns))), rows=rows)


def quality_tables(quality: Quality) -> list[Table]:
    """Return what clips show, and how near those are to their true renderings where any are."""
    tables = (adherence_table(quality), hard_captions_table(quality), likeness_table(quality))
    return [table for table in tables if table.rows]


def kills_tables(kills: Kills) -> list[Table]:
    """Return how killed runs ended, and what was computed again after each kill, by stage."""
    equal = kills.files - len(kills.altered)
    ended = Table(
        columns=("kills", "processes", "batches, all complete", "files", "of them byte-identical"),
        numbers=(0, 1, 2, 3, 4),
        rows=(tuple(map(str, (kills.kills, kills.processes, kills.batches, kills.files, equal))),),
    )
    stages = ("start", "text", "draft", "highres", "decode")
    again = Table(
        columns=("stage", "kills in it", "computed again", "times", "mean", "most"),
        numbers=(1, 3, 4, 5),
        rows=tuple(
            (
                stage,
                str(kills.killed_in.get(stage, 0)),
                {"decode": "frames", "text": "prompts"}.get(stage, "steps"),
                str(len(samples)),
                f"{statistics.fmean(samples):.2f}" if samples else "",
                f"{max(samples):.2f}" if samples else "",
            )
            for stage in stages
            for samples in (kills.again.get(stage, ()),)
            if samples or stage in kills.killed_in
        ),
    )
    return [ended, again]


def adherence_table(quality: Quality) -> Table:
    """Return the shares of captions that clips show; sharpness relative to true renderings."""
    attributes = tuple(quality.variants[0].adherence)
    true = quality.variants[0].sharpness
    return Table(
        columns=("", *attributes, "sharpness"),
        numbers=tuple(range(1, len(attributes) + 2)),
        rows=tuple(
            (
                variant.name,
                *(f"{variant.adherence[attribute]:.0%}" for attribute in attributes),
                f"{variant.sharpness / true:.2f}",
            )
            for variant in quality.variants
        ),
    )


def hard_captions_table(quality: Quality) -> Table:
    """Return the shares of the objects of hard captions that clips show."""
    columns = ("present", "shape", "motion", "clip")
    return Table(
        columns=("", *columns),
        numbers=tuple(range(1, len(columns) + 1)),
        rows=tuple(
            (f"{x.group}, {x.variant}", *(f"{x.shares[column]:.0%}" for column in columns))
            for x in quality.hard_captions
        ),
    )


def likeness_table(quality: Quality) -> Table:
    """Return PSNR, SSIM and gradient energy of clips that others are a reference for."""
    groups = (
        ("through encoder and decoder", quality.reconstruction),
        ("from true drafts", quality.from_true_drafts),
        ("of 16 steps", quality.fewer_steps),
    )
    return Table(
        columns=("", "PSNR", "SSIM", "sharpness"),
        numbers=(1, 2, 3),
        rows=tuple(
            (
                f"{title}, {likeness.name}",
                f"{likeness.mean_psnr:.1f} dB",
                f"{likeness.mean_ssim:.3f}",
                f"{likeness.sharpness:.2e}",
            )
            for title, likenesses in groups
            for likeness in likenesses
        ),
    )
