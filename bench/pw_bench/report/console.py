# SPDX-License-Identifier: Apache-2.0
"""Results as people read them on a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from pw_bench.results import Ratio, Result


def show(result: Result) -> None:
    """The short table on the terminal."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    table = Table("figure", "median", "p10", "p90", "samples", "of ceiling", "notes")
    for one in result.figures:
        low, high = one.spread
        notes = [] if one.stable else ["unstable"]
        notes += ["fell back"] if one.fell_back else []
        table.add_row(
            one.name,
            *(amount(value, one.unit) for value in (one.median, low, high)),
            str(len(one.samples)),
            "" if one.of_ceiling is None else f"{one.of_ceiling:.0%}",
            ", ".join(notes),
        )
    console.print(table)
    for same in result.equivalence:
        frames = "frames equal" if same.psnr is None else f"frames {same.psnr:.1f} dB"
        last = same.steps[-1].relative_l2
        console.print(f"{same.side} against {same.against}: {same.label} ({last:.1e}, {frames})")
    for ratio in result.ratios:
        both = (ratio.side, ratio.against)
        shaky = [f.name for f in result.figures if f.name.split("/")[0] in both and not f.stable]
        doubt = f" (unstable: {', '.join(shaky)})" if shaky and not ratio.refused else ""
        console.print(f"{ratio.side} against {ratio.against}: {said(ratio)}{doubt}")
    for clip in result.clips:
        console.print(
            f"{clip.side} {clip.start}: unattributed {max(clip.unattributed_shares):.2%} at most"
        )
    for part in result.skipped:
        console.print(f"skipped: {part.part} ({part.reason})")
    if result.identity.nvml:
        console.print(f"NVML: {result.identity.nvml}")
    if result.identity.dirty:
        console.print(f"files differed from commit {result.identity.commit}")


def amount(value: float, unit: str) -> str:
    """A quantity of a figure, as people read it."""
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    return f"{value / 2**20:.0f} MiB" if unit == "B" else f"{value:.0f} {unit}"


def said(ratio: Ratio) -> str:
    """A ratio in words."""
    if ratio.refused:
        return f"no ratio: {ratio.refused}"
    parts = [f"{ratio.cold:.2f} x as fast cold"] if ratio.cold else []
    parts += [f"{ratio.warm:.2f} x warm"] if ratio.warm else []
    parts += [f"{ratio.memory:.2f} of its peak memory"] if ratio.memory else []
    return ", ".join(parts)
