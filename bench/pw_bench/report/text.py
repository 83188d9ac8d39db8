# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown for a README, and as lines of JSON for other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from pw_bench.report import tables
from pw_bench.report.findings import TITLES, faults, headline, require_content, warnings
from pw_bench.report.machine import machine_name
from pw_bench.results import Figure, Result


def markdown(results: Sequence[Result]) -> str:
    """Return the tables of every result, each with what weakens it.

    Raises BadRequest where there is nothing to show.
    """
    require_content(results)
    return "\n".join(line for result in results for line in _section(result))


def json_lines(results: Sequence[Result]) -> str:
    """Return one line for every figure. Raises BadRequest where there is nothing to show."""
    require_content(results)
    lines = [_line(result, figure) for result in results for figure in result.figures]
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def _section(result: Result) -> Iterator[str]:
    head = headline(result)
    yield f"### {TITLES[result.kind]}: {_plain(result.scope.get('words', result.when))}"
    yield ""
    yield f"{_plain(head.line)}."
    if head.statements and head.reasons:
        yield ""
        yield f"Not in that line: {_plain('; '.join(head.reasons))}."
    yield ""
    for keyword, items in warnings(result).items():
        yield f"- **{_plain(keyword)}**: {_plain('; '.join(items))}"
    yield ""
    yield from _table(tables.overview_table(result), header=("on", machine_name(result.identity)))
    if result.quality is not None:
        for table in tables.quality_tables(result.quality):
            yield from _table(table)
    if result.kills is not None:
        for table in tables.kills_tables(result.kills):
            yield from _table(table)
    for make, rows in (
        (tables.figures_table, result.quality is None or result.figures),
        (tables.ratios_table, result.ratios),
        (tables.equivalence_table, result.equivalence),
        (tables.differences_table, result.differences),
        (tables.kernels_table, result.kernels),
        (tables.ceilings_table, result.ceilings),
    ):
        if rows:
            yield from _table(make(result))
    for skipped in result.skipped:
        yield f"- not measured: {_plain(skipped.part)} ({_plain(skipped.reason)})"
    if result.skipped:
        yield ""


def _table(table: tables.Table, header: Sequence[str] | None = None) -> Iterator[str]:
    if not table.rows:
        yield "No figures.\n"
        return
    yield _cells(header or table.columns)
    yield _cells("---:" if i in table.numbers else "---" for i in range(len(table.columns)))
    for row in table.rows:
        yield _cells(row)
    yield ""


def _cells(cells: Iterator[str] | Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """Join lines and escape what Markdown would interpret."""
    return re.sub(r"([\\|<>`*_\[\]])", r"\\\1", " ".join(text.split()))


def _line(result: Result, figure: Figure) -> dict[str, object]:
    low, high = figure.spread
    return {
        "kind": result.kind,
        "when": result.when,
        "scope": dict(result.scope),
        "commit": result.identity.commit,
        "dirty": result.identity.dirty,
        "machine": machine_name(result.identity),
        "name": figure.name,
        "unit": figure.unit,
        "median": figure.median,
        "p10": low,
        "p90": high,
        "samples": figure.samples,
        "remarks": faults(figure),
    }
