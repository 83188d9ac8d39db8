# SPDX-License-Identifier: Apache-2.0
"""Whether one result is slower or larger than an earlier one, by the spread that both recorded.

A figure has changed where two things are so. Its samples are ordered as they would be by chance
less than once in a hundred times (Mann-Whitney's rank test, which asks nothing of the noise; five
samples against five must not overlap). And its medians are further apart than one part in fifty and
than half of what lies between the 10th and 90th percentiles, both spreads added in quadrature: a
machine that drifts from minute to minute orders samples, too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import click
from rich.console import Console
from rich.table import Table

from pw_bench.report.console import amount
from pw_bench.results import Figure, Result, read_result
from pw_runtime.cli.options import DONE, FILE, SOME_FAILED
from pw_runtime.errors import BadRequest

LEAST: Final = 0.02  # a smaller change is none
WIDTHS: Final = 0.5  # of the spreads
CHANCE: Final = 0.01
FEWEST: Final = 5  # samples by which that chance can be reached

Verdict = Literal["slower", "faster", "larger", "smaller", "same", "too few samples", "fell back"]
WORDS: Final[Mapping[str, tuple[Verdict, Verdict]]] = {
    "time": ("slower", "faster"),
    "size": ("larger", "smaller"),
}
WORSE: Final = ("slower", "larger")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A figure then and now."""

    name: str
    old: float
    new: float
    threshold: float  # of the change, relative
    verdict: Verdict

    @property
    def relative(self) -> float:
        """By how much the median moved."""
        return self.new / self.old - 1


def compare_results(old: Result, new: Result) -> list[Change]:
    """Compare figures by name, in the order of the newer result.

    Raises BadRequest where the two are of other scopes or machines, or share no figure.
    """
    differing = differences(old, new)
    if differing:
        raise BadRequest(
            "the results cannot be compared",
            got="; ".join(f"{key}: {a} and {b}" for key, (a, b) in differing.items()),
            wanted="the same kind, scope and machine",
            do="measure both with the same command on the same machine",
        )
    before = {figure.name: figure for figure in old.figures}
    changes = [change(before[one.name], one) for one in new.figures if one.name in before]
    if not changes:
        raise BadRequest(
            "the results have no figure in common",
            got=", ".join(before) or "none",
            wanted=", ".join(one.name for one in new.figures) or "any",
        )
    return changes


def differences(old: Result, new: Result) -> dict[str, tuple[object, object]]:
    """What makes two results incomparable: field -> its two values."""
    a, b = _cohort(old), _cohort(new)
    keys = dict.fromkeys((*a, *b))
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def _cohort(result: Result) -> dict[str, object]:
    """What must be the same: the work and the machine; versions and commits may differ."""
    machine, state = result.identity.machine, result.identity.gpu_start
    return {
        "kind": result.kind,
        **{f"scope of {key}": value for key, value in result.scope.items()},
        "cpu": machine.cpu,
        "cores": machine.cores,
        "threads": result.identity.threads,
        "gpus": tuple(gpu.name for gpu in machine.gpus),
        "power limit": None if state is None else state.power_limit_w,
    }


def change(old: Figure, new: Figure) -> Change:
    """Compare two figures of one name."""
    a, b = old.median, new.median
    wide = math.hypot(*(one.spread[1] - one.spread[0] for one in (old, new)))
    threshold = max(LEAST, WIDTHS * wide / a)
    verdict: Verdict = "same"
    if old.fell_back or new.fell_back:
        verdict = "fell back"
    elif min(len(old.samples), len(new.samples)) < FEWEST:
        verdict = "too few samples"
    elif abs(b / a - 1) > threshold and chance_of(old.samples, new.samples) < CHANCE:
        more, less = WORDS["time" if new.unit == "s" else "size"]
        verdict = more if b > a else less
    return Change(name=new.name, old=a, new=b, threshold=threshold, verdict=verdict)


def chance_of(old: Sequence[float], new: Sequence[float]) -> float:
    """How often samples of one and the same thing are ordered at least as much as these."""
    from scipy.stats import mannwhitneyu  # a second to import

    # Not `auto`, which takes the normal approximation where two samples are equal, as those of
    # memory often are: by that no five against five are ever unlikely enough.
    few = min(len(old), len(new)) <= 8
    return float(mannwhitneyu(old, new, method="exact" if few else "asymptotic").pvalue)


@click.command()
@click.argument("old", type=FILE)
@click.argument("new", type=FILE)
def compare(old: Path, new: Path) -> int:
    """Tell whether the figures of NEW are slower or larger than those of OLD.

    If so, or where one is gone or fell back, the exit code is 3. Only results of the same scope
    from the same machine are compared.
    """
    before, after = read_result(old), read_result(new)
    changes = compare_results(before, after)
    units = {one.name: one.unit for one in after.figures}
    table = Table("figure", "old", "new", "change", "counts from", "verdict")
    for one in changes:
        table.add_row(
            one.name,
            *(amount(value, units[one.name]) for value in (one.old, one.new)),
            f"{one.relative:+.1%}",
            f"{one.threshold:.1%}",
            one.verdict,
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(table)
    names = {figure.name for figure in after.figures}
    gone = [figure.name for figure in before.figures if figure.name not in names]
    if gone:
        console.print(f"only in {old}: {', '.join(gone)}")
    fell = [one.name for one in after.figures if one.fell_back]
    worse = gone or fell or any(one.verdict in WORSE for one in changes)
    unlike = {"commit": (before.identity.commit, after.identity.commit)}
    console.print(", ".join(f"{key} {a} and {b}" for key, (a, b) in unlike.items()))
    return SOME_FAILED if worse else DONE
