# SPDX-License-Identifier: Apache-2.0
"""The two samplers, both second order and multistep, on x_sigma = (1 - sigma) x0 + sigma noise.

A model output v gives the data prediction m = x - sigma v. With alpha = 1 - sigma and
lambda = ln alpha - ln sigma, everything else is a linear combination whose coefficients are
known before the first step; they are computed here in fp64, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pw_runtime.types import Solver

Velocity = Callable[[Tensor, int], Tensor]  # (latent, step index) -> v


@dataclass(frozen=True, slots=True)
class Update:
    """x_new = keep x + data m + slope (new_weight (m_new - m) + old_weight (m_old - m) / r).

    Kept in this form, not multiplied out, because the official code rounds the `old` term to
    bf16 under autocast. Multiplied out, the second prediction of the 2K preset, for one, is
    x2 = .8973648 xc + .1123177 m1 - .0096825 m0.
    """

    keep: float
    data: float
    slope: float = 0.0
    new_weight: float = 0.0  # 0: no later prediction takes part
    old_weight: float = 0.0  # 0: no earlier prediction takes part
    inverse_r: float = 0.0


def sample(
    velocity: Velocity,
    noise: Tensor,
    sigmas: tuple[float, ...],
    solver: Solver,
    *,
    bf16_einsum: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Denoise from pure noise to x0.

    Args:
        velocity: the network with guidance applied.
        noise: [C, T, H, W] fp32.
        sigmas: of a `Schedule` made for the same solver.
        solver: "unipc" (order 2, bh2, predictor-corrector) or "dpm++" (2M, midpoint).
        bf16_einsum: round UniPC's second-order terms to bf16, as the official loop does
            under autocast.
        on_step: called after each step.

    Returns:
        [C, T, H, W] fp32.
    """
    run = _unipc if solver == "unipc" else _dpm
    return run(velocity, noise, sigmas, bf16_einsum, on_step)


def _apply(
    update: Update,
    x: Tensor,
    m: Tensor,
    new: Tensor | None,
    old: Tensor | None,
    bf16_einsum: bool = False,
) -> Tensor:
    result = update.keep * x + update.data * m
    correction = None
    if old is not None and update.old_weight:
        difference = (old - m) * update.inverse_r
        if bf16_einsum:
            weight = torch.tensor(update.old_weight, dtype=torch.bfloat16)
            correction = weight * difference.bfloat16()
        else:
            correction = update.old_weight * difference
    if new is not None and update.new_weight:
        fresh = update.new_weight * (new - m)
        correction = fresh if correction is None else correction + fresh
    if correction is None:
        return result
    # A zero-dimensional tensor, as in the official code: it does not widen a bf16 correction
    # (the predictor's), whose product then stays bf16 too.
    return result + torch.tensor(update.slope, dtype=torch.float32) * correction


# ---- UniPC: predict with the past, then correct with the new prediction ----------------------


def _unipc(
    velocity: Velocity,
    x: Tensor,
    sigmas: tuple[float, ...],
    bf16_einsum: bool,
    on_step: Callable[[], None],
) -> Tensor:
    steps = len(sigmas) - 1
    m_old: Tensor | None = None  # prediction before the latest one
    m_latest: Tensor | None = None
    corrected = x
    for i in range(steps):
        m = x - sigmas[i] * velocity(x, i)
        if i == steps - 1:  # sigma_next is 0: the prediction is the result, corrected or not
            on_step()
            return m
        if m_latest is not None:
            correction = unipc_corrector(sigmas, i)
            corrected = _apply(correction, corrected, m_latest, m, m_old, bf16_einsum)
        x = _apply(unipc_predictor(sigmas, i), corrected, m, None, m_latest, bf16_einsum)
        m_old, m_latest = m_latest, m
        on_step()
    raise ValueError("a schedule needs at least one step")


def unipc_predictor(sigmas: tuple[float, ...], i: int) -> Update:
    """Update from step i to i+1: order 1 at the first step, order 2 after it.

    The last step, order 1 as well, has sigma_next = 0 and needs no update at all.
    """
    h = _lambda(sigmas[i + 1]) - _lambda(sigmas[i])
    phi = math.expm1(-h)
    alpha = 1 - sigmas[i + 1]
    keep, data = sigmas[i + 1] / sigmas[i], -alpha * phi
    if i == 0:
        return Update(keep, data)
    r = (_lambda(sigmas[i - 1]) - _lambda(sigmas[i])) / h
    return Update(keep, data, slope=-alpha * phi, old_weight=0.5, inverse_r=1 / r)


def unipc_corrector(sigmas: tuple[float, ...], i: int) -> Update:
    """Correction of the latent at step i >= 1, from the corrected latent of step i-1.

    `m` is the prediction of step i-1, `m_new` that of step i, `m_old` that of step i-2.
    """
    h = _lambda(sigmas[i]) - _lambda(sigmas[i - 1])
    phi = math.expm1(-h)
    alpha = 1 - sigmas[i]
    keep, data = sigmas[i] / sigmas[i - 1], -alpha * phi
    if i == 1:
        return Update(keep, data, slope=-alpha * phi, new_weight=0.5)
    r = (_lambda(sigmas[i - 2]) - _lambda(sigmas[i - 1])) / h
    k = phi / -h - 1
    b1 = k / phi
    b2 = 2 * (k / -h - 0.5) / phi
    rho = (b1 - b2) / (1 - r)
    return Update(keep, data, -alpha * phi, new_weight=b1 - rho, old_weight=rho, inverse_r=1 / r)


def _lambda(sigma: float) -> float:
    """Half log signal-to-noise ratio; -inf at sigma 1 (pure noise), +inf at 0."""
    if sigma == 0.0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1.0 else -math.inf


# ---- DPM-Solver++ 2M ---------------------------------------------------------------------------


def _dpm(
    velocity: Velocity,
    x: Tensor,
    sigmas: tuple[float, ...],
    bf16_einsum: bool,
    on_step: Callable[[], None],
) -> Tensor:
    steps = len(sigmas) - 1
    m_old: Tensor | None = None
    for i in range(steps):
        m = x - sigmas[i] * velocity(x, i)
        x = _apply(dpm_update(sigmas, i), x, m, None, m_old, bf16_einsum)
        m_old = m
        on_step()
    return x


def dpm_update(sigmas: tuple[float, ...], i: int) -> Update:
    """Update from step i to i+1: order 1 at the first and the last step, order 2 between."""
    keep = sigmas[i + 1] / sigmas[i]
    alpha = 1 - sigmas[i + 1]
    h = _lambda(sigmas[i + 1]) - _lambda(sigmas[i])
    data = -alpha * math.expm1(-h)
    if i == 0 or i == len(sigmas) - 2:
        return Update(keep, data)
    inverse_r = h / (_lambda(sigmas[i]) - _lambda(sigmas[i - 1]))
    if inverse_r == 0.0:  # sigma_0 = 1: lambda is -inf there and the second order vanishes
        return Update(keep, data)
    return Update(keep, data, slope=-data, old_weight=0.5, inverse_r=inverse_r)
