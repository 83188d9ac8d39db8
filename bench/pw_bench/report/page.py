# SPDX-License-Identifier: Apache-2.0
"""The page: results in one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pw_bench.report import bars, findings, machine, roofline, tables, waterfall
from pw_bench.results import Equivalence, Result, to_json
from pw_runtime.system.atomic_files import write_text

# In JSON these stand in strings alone, where they may be written so: no tag can be closed.
_ESCAPED = {ord(one): f"\\u{ord(one):04x}" for one in "<>&\u2028\u2029"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What the page shows of one result."""

    id: str
    title: str
    result: Result
    headline: findings.Headline
    marks: dict[str, list[str]]
    groups: list[bars.Group]
    folded: bool  # many bars: behind the tables
    legend: str
    machine: list[tuple[str, str]]
    machine_name: str
    clips: list[waterfall.Drawing]
    peaks: tables.Table | None
    kernels: tables.Table | None
    roofline: roofline.Roofline | None
    equivalence: tables.Table | None
    steps: list[tuple[Equivalence, tables.Table]]
    ratios: tables.Table | None
    ceilings: tables.Table
    json: Markup


def write_html(results: Sequence[Result], path: Path) -> None:
    """Write one page of all results, in their order, whole or not at all.

    Args:
        results: one or more.
        path: of the page. It needs no other file and no network.

    Raises BadRequest where there is nothing to report, WriteFailed where the disk refuses.
    """
    findings.require_content(results)
    sections = [_section(one, f"result-{i}") for i, one in enumerate(results, 1)]
    environment = Environment(
        loader=PackageLoader("pw_bench.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja")
    write_text(path, page.render(sections=sections, file=path.name) + "\n")


def embedded(result: Result) -> Markup:
    """A result's JSON, as it may stand in a script element."""
    return Markup(json.dumps(json.loads(to_json(result))).translate(_ESCAPED))


def _section(result: Result, id_: str) -> Section:
    titles = tables.clip_titles(result)
    groups = bars.groups(result)
    drawn = [waterfall.drawing(*both) for both in zip(result.clips, titles, strict=True)]
    return Section(
        id=id_,
        title=findings.TITLES[result.kind],
        result=result,
        headline=findings.headline(result),
        marks=findings.marks(result),
        groups=groups,
        folded=sum(len(one.bars) for one in groups) > bars.MANY and bool(result.kernels),
        legend=bars.legend(result.figures),
        machine=machine.machine_rows(result.identity),
        machine_name=machine.machine_name(result.identity),
        clips=drawn,
        peaks=tables.peaks_table(result) if result.clips else None,
        kernels=tables.kernels_table(result) if result.kernels else None,
        roofline=roofline.roofline(result),
        equivalence=tables.equivalence_table(result) if result.equivalence else None,
        steps=[(one, tables.steps_table(one)) for one in result.equivalence if one.steps],
        ratios=tables.ratios_table(result) if result.ratios else None,
        ceilings=tables.ceilings_table(result),
        json=embedded(result),
    )
