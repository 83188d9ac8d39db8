# SPDX-License-Identifier: Apache-2.0
"""Text context -> draft latent: structure and motion, at low resolution."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.sampling.schedule import make_schedule, time_input
from pw_runtime.sampling.solver import sample
from pw_runtime.types import Compat, Latent, StageConfig, TextContext


def draft(
    text: TextContext,
    noise: Tensor,
    plan: StageConfig,
    compat: Compat,
    net: SegmentedDiT,
    on_step: Callable[[float], None],
) -> Latent:
    """Denoise the draft with classifier-free guidance.

    Args:
        text: context of the prompt and of its negative.
        noise: [C, T, H, W] fp32 on the network's device.
        plan: sampler settings.
        compat: official quirks.
        net: the draft transformer.
        on_step: called after each block, with the part of a step that it is.

    Returns:
        [C, T, H, W] fp32 latent.
    """
    schedule = make_schedule(plan.solver, plan.steps, plan.shift)
    texts = [net.text_keys_values(text.cond), net.text_keys_values(text.uncond)]
    positions = net.positions(noise)
    on_block = partial(on_step, 1 / sum(map(len, texts)))

    def velocities(x: Tensor, step: int) -> list[Tensor]:
        t = time_input(schedule.timesteps[step], x.device, rounded=compat.bf16_timesteps)
        modulation = net.modulation(t)
        return net.velocities(x, texts, modulation, positions, on_block=on_block)

    x = sample(
        velocities,
        noise,
        schedule.sigmas,
        plan.solver,
        plan.guidance,
        bf16_einsum=compat.bf16_einsum,
    )
    return Latent(x=x)
