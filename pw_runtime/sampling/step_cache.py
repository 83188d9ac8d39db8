# SPDX-License-Identifier: Apache-2.0
"""Steps whose velocity is extrapolated from those before, not computed: an approximation.

Between two computed steps a and b the guided velocity v changed by the relative L1 distance
|v_b - v_a| / |v_b| while the noise level fell by sigma_a - sigma_b. At that rate it changes by

    |v_b - v_a| / |v_b| * (sigma_b - sigma) / (sigma_a - sigma_b)

until a later step at sigma. While this is below the threshold, no network runs, and the step gets
the velocity on the line through both. The first two steps and the last are always computed.
docs/numerics.md compares this rule with others, and with fewer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from pw_runtime.errors import BadRequest
from pw_runtime.sampling.loop_state import LoopState
from pw_runtime.sampling.solver import Velocities
from pw_runtime.types import StageConfig

FEWEST_STEPS: Final = 8  # of a stage that may be cached; in fewer, every step changes much


def require_cacheable(draft: StageConfig, threshold: float | None) -> None:
    """Raise BadRequest for a threshold without meaning, and for a draft of too few steps."""
    if threshold is None:
        return
    if not 0 < threshold < 1:
        raise BadRequest(
            "--step-cache is a relative change of the velocity",
            got=threshold,
            wanted="a number above 0 and below 1",
            do="try 0.05, or leave it out",
        )
    if draft.steps < FEWEST_STEPS:
        raise BadRequest(
            "--step-cache needs a draft of many small steps",
            got=f"{draft.steps} steps",
            wanted=f"{FEWEST_STEPS} or more",
            do="leave it out",
        )


class StepCache:
    """The velocities of one denoising loop; it has the two last ones that were computed."""

    def __init__(
        self,
        compute: Velocities,
        sigmas: Sequence[float],
        guidance: float,
        threshold: float,
        on_skip: Callable[[], None],
    ) -> None:
        """Put a cache before the network.

        Args:
            compute: runs the network.
            sigmas: noise levels, one more than there are steps.
            guidance: scale of classifier-free guidance.
            threshold: change below which a velocity is extrapolated, above 0.
            on_skip: called for each step that is not computed.
        """
        self._compute, self._sigmas, self._guidance = compute, sigmas, guidance
        self._threshold, self._on_skip = threshold, on_skip
        self._computed: list[tuple[float, Tensor]] = []  # (sigma, guided v), at most the last two
        self._rate = math.inf  # relative change of v, per unit of sigma
        self.skipped = 0

    def velocities(self, x: Tensor, step: int) -> Sequence[Tensor]:
        """Return the velocity of each pass, or the guided one alone where it is extrapolated."""
        sigma, last = self._sigmas[step], step == len(self._sigmas) - 2
        if len(self._computed) == 2 and not last:
            (_, before), (newest, v) = self._computed
            if self._rate * (newest - sigma) < self._threshold:
                self.skipped += 1
                self._on_skip()
                share = (newest - sigma) / (self._computed[0][0] - newest)
                return [v + share * (v - before)]
        results = self._compute(x, step)
        cond, uncond = results[0], results[-1]  # with one pass the same
        self._keep(sigma, uncond + self._guidance * (cond - uncond))
        return results

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return what the next step takes over, by name."""
        numbers = {"cache.rate": self._rate, "cache.skipped": float(self.skipped)}
        numbers |= {f"cache.sigma{i}": sigma for i, (sigma, _) in enumerate(self._computed)}
        return {f"cache.v{i}": v for i, (_, v) in enumerate(self._computed)}, numbers

    def restore(self, state: LoopState) -> None:
        """Go on from the state of an earlier loop."""
        self._rate, self.skipped = state.numbers["cache.rate"], int(state.numbers["cache.skipped"])
        count = sum(name.startswith("cache.v") for name in state.tensors)
        self._computed = [
            (state.numbers[f"cache.sigma{i}"], state.tensors[f"cache.v{i}"]) for i in range(count)
        ]

    def _keep(self, sigma: float, v: Tensor) -> None:
        if self._computed:
            before_sigma, before = self._computed[-1]
            change = (v - before).abs().mean() / v.abs().mean()
            self._rate = change.item() / (before_sigma - sigma)  # NaN, too, computes every step
        self._computed = [*self._computed[-1:], (sigma, v)]
