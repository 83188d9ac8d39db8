# SPDX-License-Identifier: Apache-2.0
"""Two second-order multistep samplers for x_sigma = (1 - sigma) x0 + sigma noise.

The model output v gives the data prediction m = x - sigma v. With alpha = 1 - sigma and
lambda = ln alpha - ln sigma, everything else is a linear combination with coefficients that depend
only on the sigmas; they are computed here in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from pw_kernels import Update, guided_update
from pw_runtime.sampling.loop_state import LoopState
from pw_runtime.system.trace import observe, span
from pw_runtime.types import Solver

Velocities = Callable[[Tensor, int], Sequence[Tensor]]
"""Function of (latent, step index) that returns v of each pass: the prompt, then its negative.

With one pass, that v is the guided one.
"""


def sample(
    velocities: Velocities,
    noise: Tensor,
    sigmas: tuple[float, ...],
    solver: Solver,
    guidance: float,
    *,
    bf16_einsum: bool = False,
    start: LoopState | None = None,
    between_steps: Callable[[LoopState], None] = lambda state: None,
    settle: Callable[[Tensor], None] = lambda x: None,
) -> Tensor:
    """Denoise from pure noise to x0.

    Args:
        velocities: runs the network.
        noise: [C, T, H, W] fp32.
        sigmas: noise levels of a `Schedule` for the same solver.
        solver: "unipc" (order 2, bh2, predictor-corrector) or "dpm++" (2M, midpoint).
        guidance: scale of classifier-free guidance.
        bf16_einsum: round UniPC's second-order terms to bf16, as the official loop does
            under autocast.
        start: where an earlier loop was ended; None: the loop begins with the noise.
        between_steps: called after each step but the last.
        settle: called with the latent after each step, and may write into it.

    Returns:
        [C, T, H, W] fp32.
    """
    x = corrected = noise
    before: Tensor | None = None  # data prediction of the previous step
    earlier: Tensor | None = None  # and of the step before that
    first = 0
    if start is not None:
        first, kept = start.steps, start.tensors
        x, before, earlier = kept["x"], kept.get("before"), kept.get("earlier")
        corrected = kept.get("corrected", x)
    for i in range(first, len(sigmas) - 1):
        if solver == "unipc":
            corrector, predictor = unipc_corrector(sigmas, i), unipc_predictor(sigmas, i)
        else:
            corrector, predictor = None, dpm_update(sigmas, i)
        with span(f"step {i + 1}"):
            results = velocities(x, i)
            x, corrected, m = guided_update(
                results[0],
                results[-1],  # with one pass the difference is 0: v stays as it is
                x,
                corrected,
                before,
                earlier,
                guidance,
                sigmas[i],
                corrector,
                predictor,
                bf16_einsum=bf16_einsum and solver == "unipc",
            )
            settle(x)
        observe("latent", x)
        del results  # free the memory for the next pass of the network
        before, earlier = m, before
        if i < len(sigmas) - 2:
            named = {"x": x, "before": before}
            if solver == "unipc":  # only a corrector reads these
                named |= {"corrected": corrected, "earlier": earlier}
            tensors = {name: y for name, y in named.items() if y is not None}
            between_steps(LoopState(steps=i + 1, tensors=tensors))
            del named, tensors
    return x


# ---- UniPC: predict with the past, then correct with the new prediction ----------------------


def unipc_predictor(sigmas: tuple[float, ...], i: int) -> Update:
    """Compute the update from step i to i+1: order 1 at the first and last step, else order 2.

    At the last step, sigma_next is 0 and the data prediction is the result.
    """
    if i == len(sigmas) - 2:
        return Update(keep=0.0, data=1.0)
    h = _lambda(sigmas[i + 1]) - _lambda(sigmas[i])
    phi = math.expm1(-h)
    alpha = 1 - sigmas[i + 1]
    keep, data = sigmas[i + 1] / sigmas[i], -alpha * phi
    if i == 0:
        return Update(keep, data)
    r = (_lambda(sigmas[i - 1]) - _lambda(sigmas[i])) / h
    return Update(keep, data, slope=-alpha * phi, old_weight=0.5, inverse_r=1 / r)


def unipc_corrector(sigmas: tuple[float, ...], i: int) -> Update | None:
    """Compute the correction of the latent at step i, from the corrected latent of step i-1.

    `m` is the prediction of step i-1, `m_new` that of step i, `m_old` that of step i-2. None at the
    first step, where nothing precedes, and at the last, whose result is the prediction itself.
    """
    if i == 0 or i == len(sigmas) - 2:
        return None
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
    """Return half the log signal-to-noise ratio; -inf at sigma 1 (pure noise), +inf at 0."""
    if sigma == 0.0:
        return math.inf
    return math.log1p(-sigma) - math.log(sigma) if sigma < 1.0 else -math.inf


# ---- DPM-Solver++ 2M ---------------------------------------------------------------------------


def dpm_update(sigmas: tuple[float, ...], i: int) -> Update:
    """Compute the update from step i to i+1: order 1 at the first and last step, else order 2."""
    keep = sigmas[i + 1] / sigmas[i]
    alpha = 1 - sigmas[i + 1]
    h = _lambda(sigmas[i + 1]) - _lambda(sigmas[i])
    data = -alpha * math.expm1(-h)
    if i == 0 or i == len(sigmas) - 2:
        return Update(keep, data)
    inverse_r = h / (_lambda(sigmas[i]) - _lambda(sigmas[i - 1]))
    if inverse_r == 0.0:  # sigma_0 = 1: lambda is -inf there, the second-order term vanishes
        return Update(keep, data)
    return Update(keep, data, slope=-data, old_weight=0.5, inverse_r=inverse_r)
