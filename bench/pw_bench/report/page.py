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
from pw_bench.result_sections import Equivalence
from pw_bench.results import Result, to_json
from pw_runtime.system.atomic_files import write_text

# In JSON these occur in strings only, where this form is allowed: no tag can be closed.
_ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Everything that the page shows of one result."""

    id: str
    title: str
    result: Result
    headline: findings.Headline
    warnings: dict[str, list[str]]
    groups: list[bars.Group]
    folded: bool  # many bars: behind the tables
    legend: str
    machine: list[tuple[str, str]]
    machine_name: str
    clips: list[waterfall.Drawing]
    peaks: tables.Table | None
    kernels: tables.Table | None
    roofline: roofline.Roofline | None
    quality: list[tables.Table]
    equivalence: tables.Table | None
    steps: list[tuple[Equivalence, tables.Table]]
    differences: tables.Table | None
    ratios: tables.Table | None
    ceilings: tables.Table | None
    json: Markup


def write_html(results: Sequence[Result], path: Path) -> None:
    """Write one page of all results, in their order, whole or not at all.

    Args:
        results: one or more.
        path: of the page. It needs no other file and no network.

    Raises BadRequest where there is nothing to report, WriteFailed where the disk refuses.
    """
    findings.require_content(results)
    sections = [_section(result, f"result-{i}") for i, result in enumerate(results, 1)]
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
    """Return a result's JSON in the form that a script element may contain."""
    return Markup(json.dumps(json.loads(to_json(result))).translate(_ESCAPED))


def _section(result: Result, id_: str) -> Section:
    titles = tables.clip_titles(result)
    groups = bars.groups(result)
    quality = result.quality
    return Section(
        id=id_,
        title=findings.TITLES[result.kind],
        result=result,
        headline=findings.headline(result),
        warnings=findings.warnings(result),
        groups=groups,
        folded=sum(len(group.bars) for group in groups) > bars.FOLD_FROM and bool(result.kernels),
        legend=bars.legend(result.figures),
        machine=machine.machine_rows(result.identity),
        machine_name=machine.machine_name(result.identity),
        clips=[waterfall.drawing(*pair) for pair in zip(result.clips, titles, strict=True)],
        peaks=tables.peaks_table(result) if result.clips else None,
        kernels=tables.kernels_table(result) if result.kernels else None,
        roofline=roofline.roofline(result),
        quality=[
            *([] if quality is None else tables.quality_tables(quality)),
            *([] if result.kills is None else tables.kills_tables(result.kills)),
        ],
        equivalence=tables.equivalence_table(result) if result.equivalence else None,
        steps=[(same, tables.steps_table(same)) for same in result.equivalence if same.steps],
        differences=tables.differences_table(result) if result.differences else None,
        ratios=tables.ratios_table(result) if result.ratios else None,
        ceilings=tables.ceilings_table(result) if result.ceilings else None,
        json=embedded(result),
    )
