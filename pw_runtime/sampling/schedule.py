# SPDX-License-Identifier: Apache-2.0
"""Noise levels, timesteps and step sizes of a sampler, computed from plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pw_runtime.types import TRAIN_STEPS, Solver, StageConfig

# 1 - 1/1000 in fp32, as the official scheduler stores it.
UNIPC_SIGMA_MAX = float(np.float32(0.999))
DPM_SIGMA_MAX = 1.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Noise levels and network inputs of one sampling run."""

    sigmas: tuple[float, ...]  # fp32 noise shares, one more than there are steps; the last is 0
    timesteps: tuple[int, ...]  # network input of each step, in thousandths
    step_sizes: tuple[int, ...]  # dt of each step, in thousandths, even


def make_schedule(solver: Solver, steps: int, shift: float) -> Schedule:
    """Compute the shifted flow-matching schedule of the official samplers.

    sigma' = shift sigma / (1 + (shift - 1) sigma) on an even grid from 0.999 (unipc) or 1 (dpm++);
    computed in fp64, sigmas stored in fp32, timesteps = trunc(1000 sigma').
    Sources: fm_solvers_unipc.py, fm_solvers.py (get_sampling_sigmas), textimage2video_HR.py.
    """
    sigma_max = UNIPC_SIGMA_MAX if solver == "unipc" else DPM_SIGMA_MAX
    grid = np.linspace(sigma_max, 0.0, steps + 1)[:steps]
    sigmas = shift * grid / (1 + (shift - 1) * grid)
    timesteps = tuple(int(t) for t in (sigmas * TRAIN_STEPS).astype(np.int64))
    return Schedule(
        sigmas=(*(float(s) for s in sigmas.astype(np.float32)), 0.0),
        timesteps=timesteps,
        step_sizes=tuple(
            even_step(t - t_next) for t, t_next in zip(timesteps, (*timesteps[1:], 0), strict=True)
        ),
    )


def first_step(sigmas: Sequence[float], strength: float) -> int:
    """Return the first step that begins at a noise level of at most `strength`.

    Args:
        sigmas: noise levels, one more than there are steps; the last is 0.
        strength: 0 to 1; at 1 it is step 0, at 0 the number of steps: none is left.
    """
    if strength == 1:
        return 0
    return next(step for step, sigma in enumerate(sigmas) if sigma <= strength)


def steps_left(config: StageConfig, strength: float) -> int:
    """Return how many steps of a stage begin at a noise level of at most `strength`."""
    schedule = make_schedule(config.solver, config.steps, config.shift)
    return config.steps - first_step(schedule.sigmas, strength)


def even_step(dt: int) -> int:
    """Round a step size down to an even number, at least 2 (default of the shortcut model)."""
    return max(2, abs(dt) - abs(dt) % 2)


def time_input(value: int, device: torch.device, *, rounded: bool = False) -> Tensor:
    """Make the network input of a timestep or step size.

    Args:
        value: thousandths.
        device: device of the network.
        rounded: round to bf16, as the official multi-GPU code rounds the inputs of the DiT.

    Returns:
        [1] fp32.
    """
    t = torch.tensor([value], dtype=torch.float32, device=device)
    return t.bfloat16().float() if rounded else t
