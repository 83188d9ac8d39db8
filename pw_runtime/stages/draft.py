# SPDX-License-Identifier: Apache-2.0
"""Text context -> draft latent: structure and motion, at low resolution."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pw_runtime.execution.protocols import Transformer
from pw_runtime.sampling.denoise import denoise
from pw_runtime.sampling.loop_state import StepLog
from pw_runtime.sampling.schedule import first_step, make_schedule
from pw_runtime.types import Compat, Latent, StageConfig, TextContext


def denoise_draft(
    net: Transformer,
    text: TextContext,
    noise: Tensor,
    config: StageConfig,
    compat: Compat,
    on_step: Callable[[float], None],
    step_cache: float | None = None,
    notice: Callable[[str], None] = lambda text: None,
    log: StepLog | None = None,
    fixed: Tensor | None = None,
    begun: Latent | None = None,
    strength: float = 1.0,
) -> Latent:
    """Denoise the draft with classifier-free guidance, in many small steps.

    Args:
        net: the draft transformer.
        text: context of the prompt and of its negative.
        noise: [C, T, H, W] fp32 on the network's device.
        config: sampler settings.
        compat: official quirks.
        on_step: called after each block, with the fraction of a step that it is.
        step_cache: see `denoise`.
        notice: see `denoise`.
        log: keeps the state between steps, and has the one to go on from.
        fixed: see `denoise`.
        begun: [C, T, H, W] latent of a video that the draft begins with, in place of noise alone.
        strength: noise level that is mixed into it, or the next lower one of the schedule, whose
            step is then the first (SDEdit, arXiv 2108.01073).

    Returns:
        [C, T, H, W] fp32 latent.
    """
    first = 0
    if begun is not None:
        sigmas = make_schedule(config.solver, config.steps, config.shift).sigmas
        first = first_step(sigmas, strength)
        noise = (1 - sigmas[first]) * begun.x.to(noise) + sigmas[first] * noise
    return denoise(
        *(net, text, noise, config, compat, on_step),
        step_cache=step_cache,
        notice=notice,
        log=log,
        fixed=fixed,
        first=first,
    )
