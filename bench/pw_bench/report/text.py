# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown for a README, and as lines of JSON for other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from pw_bench.report import tables
from pw_bench.report.findings import TITLES, faults, headline, marks, require_content
from pw_bench.report.machine import machine_name
from pw_bench.results import Figure, Result


def markdown(results: Sequence[Result]) -> str:
    """Tables of every result, each with what speaks against it.

    Raises BadRequest where nothing can be shown.
    """
    require_content(results)
    return "\n".join(line for result in results for line in _section(result))


def json_lines(results: Sequence[Result]) -> str:
    """One line for every figure. Raises BadRequest where nothing can be shown."""
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
    for word, said in marks(result).items():
        yield f"- **{_plain(word)}**: {_plain('; '.join(said))}"
    yield ""
    yield from _table(tables.overview_table(result), header=("on", machine_name(result.identity)))
    yield from _table(tables.figures_table(result))
    for table, rows in (
        (tables.ratios_table, result.ratios),
        (tables.equivalence_table, result.equivalence),
        (tables.kernels_table, result.kernels),
    ):
        if rows:
            yield from _table(table(result))
    yield from _table(tables.ceilings_table(result))
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


def _cells(words: Iterator[str] | Sequence[str]) -> str:
    return f"| {' | '.join(_plain(one) for one in words)} |"


def _plain(words: str) -> str:
    """In one line, and nothing in it that Markdown would take for its own."""
    return re.sub(r"([\\|<>`*_\[\]])", r"\\\1", " ".join(words.split()))


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
