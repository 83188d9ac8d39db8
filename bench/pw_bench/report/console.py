# SPDX-License-Identifier: Apache-2.0
"""Results on the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from pw_bench.report import tables
from pw_bench.report.findings import describe_value, ratio_label, ratio_values
from pw_bench.report.regressions import Comparison
from pw_bench.report.units import quantity, small
from pw_bench.result_sections import Clip, KernelRow, OutputDifference, Ratio
from pw_bench.results import Figure, Result


def show(result: Result) -> None:
    """Print the short tables of a result, and what is wrong with them."""
    console = _console(160 if result.kernels else 110)
    if result.kernels:
        console.print(_kernels_table(result))
    elif result.figures:
        console.print(_figures_table(result))
    for same in result.equivalence:
        frames = "frames equal" if same.psnr is None else f"frames {same.psnr:.1f} dB"
        last = f"{same.steps[-1].relative_l2:.1e}" if same.steps else "steps not recorded"
        console.print(f"{same.side} against {same.against}: {same.label} ({last}, {frames})")
    for difference in result.differences:
        console.print(_difference_line(difference))
    for ratio in result.ratios:
        console.print(_ratio_line(result, ratio))
    for clip in result.clips:
        for line in _clip_lines(clip):
            console.print(line)
    if result.quality is not None:
        for table in tables.quality_tables(result.quality):
            console.print(_rich_table(table))
    if result.kills is not None:
        for table in tables.kills_tables(result.kills):
            console.print(_rich_table(table))
    for part in result.skipped:
        console.print(f"skipped: {part.part} ({part.reason})")
    if result.identity.nvml:
        console.print(f"NVML: {result.identity.nvml}")
    if result.identity.dirty:
        console.print(f"files differed from commit {result.identity.commit}")


def show_comparison(comparison: Comparison) -> None:
    """Print the table of `pw bench compare`, and the figures that are missing."""
    table = Table("figure", "old", "new", "change", "counts from", "verdict")
    for change in comparison.changes:
        table.add_row(
            change.name,
            *(quantity(change.unit, value) for value in (change.old, change.new)),
            f"{change.relative:+.1%}",
            f"{change.threshold:.1%}",
            change.verdict,
        )
    console = _console(110)
    console.print(table)
    if comparison.missing:
        console.print(f"only in the old result: {', '.join(comparison.missing)}")


def _console(width: int) -> Console:
    """Return a console, `width` characters wide where it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else width)


def _figures_table(result: Result) -> Table:
    table = Table("figure", "median", "p10", "p90", "samples", "of ceiling", "notes")
    for figure in result.figures:
        low, high = figure.spread
        notes = [] if figure.stable else ["unstable"]
        notes += ["fell back"] if figure.fell_back else []
        table.add_row(
            figure.name,
            *(quantity(figure.unit, value) for value in (figure.median, low, high)),
            str(len(figure.samples)),
            "" if figure.of_ceiling is None else f"{figure.of_ceiling:.0%}",
            ", ".join(notes),
        )
    return table


def _kernels_table(result: Result) -> Table:
    figures = {figure.name: figure for figure in result.figures}
    table = Table("operation", "size", "by", "ms", "rate", "of ceiling", "error", "ratio", "notes")
    for row in result.kernels:
        table.add_row(*_kernel_cells(row, figures.get(row.figure)))
    return table


def _kernel_cells(row: KernelRow, figure: Figure | None) -> tuple[str, ...]:
    notes = [row.refused] if row.refused else []
    notes += ["differs when repeated"] if row.same_twice is False else []
    notes += ["NaN"] if row.finite is False else []
    notes += ["unstable"] if figure is not None and not figure.stable else []
    timed = ("", "", "")
    if figure is not None and row.rate is not None:
        timed = (
            f"{figure.median * 1e3:.3f}",
            f"{row.rate / 1e9:,.1f} G/s",
            "" if figure.of_ceiling is None else f"{figure.of_ceiling:.0%}",
        )
    return (
        row.op,
        row.size,
        row.implementation,
        *timed,
        "" if row.error is None else f"{row.error:.1e}",
        "" if row.error_ratio is None else f"{row.error_ratio:.2f}",
        "; ".join(notes),
    )


def _difference_line(difference: OutputDifference) -> str:
    l2, share = difference.relative_l2, difference.share
    if share == 0:
        return f"{difference.side} against {difference.against}: equal bit for bit"
    details = f"{difference.max_abs:.2g} ({difference.unit}) at most"
    details += "" if l2 is None else f", relative L2 {small(l2)}"
    details += "" if share is None else f", in {share:.2e} of the values"
    return f"{difference.side} against {difference.against}: differs by {details}"


def _ratio_line(result: Result, ratio: Ratio) -> str:
    where = f"{ratio.side} against {ratio.against}"
    if ratio.refused:
        return f"{where}: no ratio: {ratio.refused}"
    programs = (ratio.side, ratio.against)
    shaky = [f.name for f in result.figures if f.name.split("/")[0] in programs and not f.stable]
    doubt = f" (unstable: {', '.join(shaky)})" if shaky else ""
    values = ratio_values(result, ratio).items()
    said = ", ".join(describe_value(*value) for value in values)
    return f"{where}: {said} (outputs: {ratio_label(result, ratio)}){doubt}"


def _clip_lines(clip: Clip) -> list[str]:
    """Return what no span covers, and each stage's memory beside the plan's."""
    lines = [f"{clip.side} {clip.start}: unattributed {max(clip.unattributed_shares):.2%} at most"]
    for stage, places in clip.measured.items():
        for place, size in places.items():
            line, measured = f"    {stage}, {place}: ", f"measured {quantity('B', size)}"
            if predicted := clip.predicted.get(stage, {}).get(place):
                line += f"predicted {quantity('B', predicted)}, "
                measured += f", {size / predicted:.3f} of it"
            lines.append(line + measured)
    return lines


def _rich_table(table: tables.Table) -> Table:
    out = Table(*table.columns)
    for row in table.rows:
        out.add_row(*row)
    return out
