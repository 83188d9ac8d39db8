# SPDX-License-Identifier: Apache-2.0
"""Comparison of a result with an earlier one, given the spread of both.

A figure has changed where two conditions hold. Its samples are ordered as they would be by chance
less than once in a hundred times (Mann-Whitney's rank test, which assumes nothing about the noise;
five samples against five must not overlap). And its medians are further apart than one part in
fifty and than half of the distance between the 10th and 90th percentiles, both spreads added in
quadrature: a machine that drifts from minute to minute orders samples, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pw_bench.results import Figure, Result
from pw_runtime.errors import BadRequest

MIN_CHANGE: Final = 0.02  # a smaller one counts as none
SPREAD_SHARE: Final = 0.5  # of the spreads, that a change must exceed
CHANCE: Final = 0.01
MIN_SAMPLES: Final = 5  # with fewer, that chance cannot be reached

Verdict = Literal["slower", "faster", "larger", "smaller", "same", "too few samples", "fell back"]
VERDICTS: Final[Mapping[str, tuple[Verdict, Verdict]]] = {
    "time": ("slower", "faster"),
    "size": ("larger", "smaller"),
}
WORSE: Final = ("slower", "larger")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A figure then and now; the change is significant from `threshold`, relative to `old`."""

    name: str
    unit: str
    old: float
    new: float
    threshold: float
    verdict: Verdict

    @property
    def relative(self) -> float:
        """Relative change of the median; infinite where there was nothing before."""
        return _relative(self.old, self.new)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All figures of two comparable results."""

    changes: tuple[Change, ...]
    missing: tuple[str, ...]  # figures of the old result that the new one lacks
    fell_back: tuple[str, ...]  # figures of the new result

    @property
    def is_worse(self) -> bool:
        """True where something is slower or larger, is missing or fell back."""
        worse = any(change.verdict in WORSE for change in self.changes)
        return worse or bool(self.missing or self.fell_back)


def compare_results(old: Result, new: Result) -> Comparison:
    """Compare figures by name, in the order of the newer result.

    Raises BadRequest where the two differ in scope or machine, or share no figure.
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
    after = {figure.name: figure for figure in new.figures}
    changes = tuple(
        change(before[name], figure) for name, figure in after.items() if name in before
    )
    if not changes:
        raise BadRequest(
            "the results have no figure in common",
            got=", ".join(before) or "none",
            wanted=", ".join(after) or "any",
        )
    return Comparison(
        changes=changes,
        missing=tuple(name for name in before if name not in after),
        fell_back=tuple(name for name, figure in after.items() if figure.fell_back),
    )


def differences(old: Result, new: Result) -> dict[str, tuple[object, object]]:
    """Return what makes two results incomparable: field -> its two values."""
    a, b = _cohort(old), _cohort(new)
    keys = dict.fromkeys((*a, *b))
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def _cohort(result: Result) -> dict[str, object]:
    """Return what must be the same: work and machine; versions and commits may differ."""
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
    spread = math.hypot(*(figure.spread[1] - figure.spread[0] for figure in (old, new)))
    threshold = max(MIN_CHANGE, SPREAD_SHARE * spread / a if a else 0.0)
    verdict: Verdict = "same"
    if old.fell_back or new.fell_back:
        verdict = "fell back"
    elif min(len(old.samples), len(new.samples)) < MIN_SAMPLES:
        verdict = "too few samples"
    elif abs(_relative(a, b)) > threshold and chance_of(old.samples, new.samples) < CHANCE:
        more, less = VERDICTS["time" if new.unit == "s" else "size"]
        verdict = more if b > a else less
    return Change(name=new.name, unit=new.unit, old=a, new=b, threshold=threshold, verdict=verdict)


def _relative(old: float, new: float) -> float:
    """Return the relative change; memory that is measured as growth may have been 0."""
    if old == 0:
        return math.inf if new else 0.0
    return new / old - 1


def chance_of(old: Sequence[float], new: Sequence[float]) -> float:
    """Return the probability that samples of one distribution are ordered as much as these."""
    from scipy.stats import mannwhitneyu  # a second to import

    # Not `auto`, which takes the normal approximation where two samples are equal, as those of
    # memory often are: with it, five against five are never unlikely enough.
    few = min(len(old), len(new)) <= 8
    return float(mannwhitneyu(old, new, method="exact" if few else "asymptotic").pvalue)
