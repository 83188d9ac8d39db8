# SPDX-License-Identifier: Apache-2.0
"""A draft that begins between: with a video, at one of the noise levels of its schedule."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from pw_runtime.sampling.schedule import first_step, make_schedule, steps_left
from pw_runtime.sampling.solver import sample
from pw_runtime.types import Solver, StageConfig

STEPS, SHIFT = 12, 5.0


def velocity(x: Tensor, sigma: float) -> Tensor:
    """Return something smooth that depends on both."""
    return torch.sin(3 * x) + sigma * x.mean()


def from_diffusers(solver: Solver, x: Tensor, sigmas: Sequence[float], first: int) -> Tensor:
    """Run the scheduler of diffusers from one of its steps on."""
    kind = UniPCMultistepScheduler if solver == "unipc" else DPMSolverMultistepScheduler
    scheduler = kind(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, solver_order=2
    )
    scheduler.set_timesteps(STEPS)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.set_begin_index(first)
    for step in range(first, STEPS):
        v = velocity(x, sigmas[step])
        x = scheduler.step(v, scheduler.timesteps[step], x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("first", [1, 4, STEPS - 2, STEPS - 1])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_a_solver_that_begins_between_has_no_past(solver: Solver, first: int) -> None:
    """Order 1 and no corrector at the first step that runs, as diffusers has it."""
    sigmas = make_schedule(solver, STEPS, SHIFT).sigmas
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(first)).double()

    def velocities(x: Tensor, step: int) -> tuple[Tensor]:
        return (velocity(x, sigmas[first + step]),)

    ours = sample(velocities, x, sigmas[first:], solver, 1.0)
    theirs = from_diffusers(solver, x, sigmas, first)
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_the_first_step_is_the_first_at_or_below_the_strength(solver: Solver) -> None:
    sigmas = make_schedule(solver, STEPS, SHIFT).sigmas
    for step in range(1, STEPS):
        assert first_step(sigmas, sigmas[step]) == step
        assert first_step(sigmas, sigmas[step] - 1e-6) == step + 1
    assert first_step(sigmas, 1) == 0
    assert first_step(sigmas, 0) == STEPS


def test_all_steps_are_left_at_one_and_none_at_zero() -> None:
    config = StageConfig(width=64, height=64, steps=STEPS, shift=SHIFT, guidance=1.0)
    assert steps_left(config, 1) == STEPS
    assert steps_left(config, 0) == 0
    counts = [steps_left(config, strength / 100) for strength in range(101)]
    assert counts == sorted(counts)
