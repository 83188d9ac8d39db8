# SPDX-License-Identifier: Apache-2.0
"""Official schedules and solvers of flow matching, in scalar arithmetic (fp64) on fp32 latents.

A velocity function maps (latent, timestep, dt) to the latent's velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pw_runtime.system.trace import observe, span
from pw_runtime.types import Solver

Velocity = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Plain numbers; sigmas has one entry more than timesteps and dts."""

    sigmas: tuple[float, ...]
    timesteps: tuple[int, ...]
    dts: tuple[int, ...]

    def lam(self, i: int) -> float:
        """Return half the log signal-to-noise ratio: ln(1 - sigma) - ln(sigma)."""
        sigma = self.sigmas[i]
        if sigma in (0.0, 1.0):
            return math.inf if sigma == 0.0 else -math.inf
        return math.log(1 - sigma) - math.log(sigma)


def quantise_dt(timesteps: list[int]) -> tuple[int, ...]:
    """Return the distance to the next timestep (0 after the last), made even, at least 2."""
    gaps = [abs(now - after) for now, after in zip(timesteps, [*timesteps[1:], 0], strict=True)]
    return tuple(max(gap - gap % 2, 2) for gap in gaps)


def schedule(solver: Solver, steps: int, shift: float) -> Schedule:
    """Return the shifted grid of "unipc" (from fp32(0.999)) or "dpm++" (from 1)."""
    top = {"unipc": float(np.float32(0.999)), "dpm++": 1.0}[solver]
    grid = np.linspace(top, 0, steps + 1)[:steps]
    sigmas = shift * grid / (1 + (shift - 1) * grid)
    timesteps = [int(value) for value in np.trunc(1000 * sigmas)]
    stored = [float(value) for value in sigmas.astype(np.float32)]
    return Schedule((*stored, 0.0), tuple(timesteps), quantise_dt(timesteps))


def _einsum(coefficient: float, difference: Tensor, bf16: bool) -> Tensor:
    """Compute coefficient * difference; under autocast from bf16 operands to a bf16 result."""
    if not bf16:
        return coefficient * difference
    rounded = torch.tensor(coefficient, device=difference.device).bfloat16()
    return rounded * difference.bfloat16()


def _unipc_correct(
    s: Schedule, i: int, order: int, x: Tensor, m: list[Tensor], bf16_einsum: bool
) -> Tensor:
    """Correct the sample at step i, from the corrected x at i - 1; m ends with step i."""
    sigma, alpha = s.sigmas[i], 1 - s.sigmas[i]
    h = s.lam(i) - s.lam(i - 1)
    phi = math.expm1(-h)
    base = sigma / s.sigmas[i - 1] * x - alpha * phi * m[-2]
    if order == 1:
        return base - alpha * phi * 0.5 * (m[-1] - m[-2])
    r = (s.lam(i - 2) - s.lam(i - 1)) / h
    k = phi / -h - 1
    b1 = k / phi
    b2 = 2 * (k / -h - 0.5) / phi
    rho0 = (b1 - b2) / (1 - r)
    rho1 = b1 - rho0
    older = _einsum(rho0, (m[-3] - m[-2]) / r, bf16_einsum)
    return base - alpha * phi * (older + rho1 * (m[-1] - m[-2]))


def _unipc_predict(
    s: Schedule, i: int, order: int, x: Tensor, m: list[Tensor], bf16_einsum: bool
) -> Tensor:
    """Predict the sample at step i + 1, from the corrected x at i; m ends with step i."""
    if i + 1 == len(s.timesteps):
        return m[-1]
    alpha = 1 - s.sigmas[i + 1]
    h = s.lam(i + 1) - s.lam(i)
    phi = math.expm1(-h)
    after = s.sigmas[i + 1] / s.sigmas[i] * x - alpha * phi * m[-1]
    if order == 2:
        r = (s.lam(i - 1) - s.lam(i)) / h
        # A 0-dim CPU tensor as in the official code: times a bf16 tensor it is rounded to bf16 on
        # the CPU and stays fp32 on CUDA.
        scale = torch.tensor(alpha * phi)
        after = after - scale * _einsum(0.5, (m[-2] - m[-1]) / r, bf16_einsum)
    return after


def unipc(
    velocity: Velocity, noise: Tensor, s: Schedule, *, bf16_einsum: bool = False
) -> Iterator[Tensor]:
    """Solve by UniPC of order 2, bh2, predicting x0; yield the latent after each step."""
    steps = len(s.timesteps)
    orders = [min(2, steps - i, i + 1) for i in range(steps)]
    m: list[Tensor] = []  # predictions of x0, of the last three steps
    x = corrected = noise
    for i in range(steps):
        with span(f"step {i + 1}"):
            m = [*m[-2:], x - s.sigmas[i] * velocity(x, s.timesteps[i], s.dts[i])]
            if i > 0:
                corrected = _unipc_correct(s, i, orders[i - 1], corrected, m, bf16_einsum)
            x = _unipc_predict(s, i, orders[i], corrected, m, bf16_einsum)
        yield x


def dpmpp(velocity: Velocity, noise: Tensor, s: Schedule) -> Iterator[Tensor]:
    """Solve by DPM-Solver++ 2M, midpoint; yield the latent after each step."""
    steps = len(s.timesteps)
    m: list[Tensor] = []  # predictions of x0, of the last two steps
    x = noise
    for i in range(steps):
        with span(f"step {i + 1}"):
            m = [*m[-1:], x - s.sigmas[i] * velocity(x, s.timesteps[i], s.dts[i])]
            alpha = 1 - s.sigmas[i + 1]
            h = s.lam(i + 1) - s.lam(i)
            e = math.exp(-h) - 1
            after = s.sigmas[i + 1] / s.sigmas[i] * x - alpha * e * m[-1]
            first_or_last = i in (0, steps - 1)
            if not first_or_last and math.isfinite(s.lam(i - 1)):
                r0 = (s.lam(i) - s.lam(i - 1)) / h
                after = after - 0.5 * alpha * e * (m[-1] - m[-2]) / r0
            x = after
        yield x


def solve(
    solver: Solver, velocity: Velocity, noise: Tensor, s: Schedule, *, bf16_einsum: bool = False
) -> Tensor:
    """Return the final latent in fp32; each step's latent is observed as "latent"."""
    if solver == "unipc":
        trajectory = unipc(velocity, noise, s, bf16_einsum=bf16_einsum)
    else:
        trajectory = dpmpp(velocity, noise, s)
    x = noise
    for x in trajectory:
        observe("latent", x)
    return x
