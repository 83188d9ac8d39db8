# SPDX-License-Identifier: Apache-2.0
"""High-res steps that run no negative pass, but take its distance from the first: an approximation.

Guidance adds a multiple of the difference of two passes, cond - uncond. At high noise this hardly
changes from one step to the next, and the first steps of the high-res stage are at high noise: at
0.999, 0.943 and 0.846 of 1 in four steps with shift 5.5. The last step is at low noise and decides
most of the picture, so its negative pass always runs. docs/numerics.md has the errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pw_runtime.errors import BadRequest
from pw_runtime.sampling.loop_state import LoopState
from pw_runtime.types import StageConfig

Passes = Callable[[Tensor, int, int], list[Tensor]]
"""Function of (latent, step index, number of passes) that returns v of each: the prompt's first."""


def require_reusable(highres: StageConfig | None, steps: int) -> None:
    """Raise BadRequest where a stage has no negative pass in `steps` steps after its first."""
    if steps == 0:
        return
    if highres is None or len(highres.passes) < 2:
        raise BadRequest(
            "--guidance-reuse needs a high-res stage with a negative pass",
            got="no high-res stage" if highres is None else f"guidance {highres.guidance:g}",
            do="leave it out",
        )
    if not 1 <= steps <= highres.steps - 2:
        raise BadRequest(
            "--guidance-reuse is a number of steps between the first and the last of the high-res "
            "stage",
            got=f"{steps}, and {highres.steps} steps",
            wanted=f"1 to {highres.steps - 2}" if highres.steps > 2 else "a stage of more steps",
            do="choose fewer, or leave it out",
        )


class GuidanceReuse:
    """The velocities of one denoising loop; it keeps the difference of the first step's passes."""

    def __init__(self, compute: Passes, steps: int) -> None:
        """Take the network's passes, and the number of steps after the first that reuse it."""
        self._compute, self._steps = compute, steps
        self._difference: Tensor | None = None  # [C, T, H, W]

    def velocities(self, x: Tensor, step: int) -> Sequence[Tensor]:
        """Return the velocity of both passes."""
        if self._difference is not None and step <= self._steps:
            (cond,) = self._compute(x, step, 1)
            return [cond, cond - self._difference]
        results = self._compute(x, step, 2)
        self._difference = results[0] - results[1] if step < self._steps else None
        return results

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return what the next step takes over, by name."""
        return ({} if self._difference is None else {"reuse.difference": self._difference}), {}

    def restore(self, state: LoopState) -> None:
        """Go on from the state of an earlier loop."""
        self._difference = state.tensors.get("reuse.difference")
