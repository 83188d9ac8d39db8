# SPDX-License-Identifier: Apache-2.0
"""Noise levels, timesteps and step sizes of a sampler, from plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pw_runtime.types import TRAIN_STEPS, Solver

# 1 - 1/1000 as the official scheduler stores it: in fp32.
UNIPC_SIGMA_MAX = float(np.float32(0.999))
DPM_SIGMA_MAX = 1.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """One sampling run. `sigmas` has one entry more than there are steps; the last is 0."""

    sigmas: tuple[float, ...]  # fp32 values, noise share of the latent
    timesteps: tuple[int, ...]  # what the networks are given, thousandths
    step_sizes: tuple[int, ...]  # dt, even thousandths


def make_schedule(solver: Solver, steps: int, shift: float) -> Schedule:
    """Shifted flow-matching schedule of the official samplers.

    sigma' = shift sigma / (1 + (shift - 1) sigma) on an even grid that starts at 0.999 (unipc)
    or 1 (dpm++); computed in fp64, sigmas stored in fp32, timesteps = trunc(1000 sigma').
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


def even_step(dt: int) -> int:
    """Round a step size down to an even number, at least 2 (the default rule of the shortcut)."""
    return max(2, abs(dt) - abs(dt) % 2)


def time_input(value: int, device: torch.device, *, rounded: bool = False) -> Tensor:
    """A timestep or step size as a network takes it.

    Args:
        value: thousandths.
        device: where the network is.
        rounded: round to bf16, as the official multi-GPU code does to what enters the DiT.

    Returns:
        [1] fp32.
    """
    t = torch.tensor([value], dtype=torch.float32, device=device)
    return t.bfloat16().float() if rounded else t
