# SPDX-License-Identifier: Apache-2.0
"""Text context and conditioning -> high-res latent, in a few shortcut steps from pure noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.sampling.schedule import make_schedule, time_input
from pw_runtime.sampling.solver import sample
from pw_runtime.types import Compat, Conditioning, Latent, StageConfig, TextContext


def highres(
    text: TextContext,
    conditioning: Conditioning,
    noise: Tensor,
    plan: StageConfig,
    compat: Compat,
    net: SegmentedDiT,
    on_step: Callable[[float], None],
) -> Latent:
    """Denoise at full resolution; every step also tells the network how far it will go (dt).

    Args:
        text: context of the prompt and of its negative.
        conditioning: resized draft latent, on the network's device.
        noise: [C, T, H, W] fp32 on the network's device.
        plan: sampler settings.
        compat: official quirks.
        net: the high-res transformer with adapter and dt embedding.
        on_step: called after each block, with the part of a step that it is.

    Returns:
        [C, T, H, W] fp32 latent.
    """
    schedule = make_schedule(plan.solver, plan.steps, plan.shift)
    texts = [net.text_keys_values(text.cond), net.text_keys_values(text.uncond)]
    positions = net.positions(noise)
    on_block = partial(on_step, 1 / sum(map(len, texts)))
    features = net.draft_features(conditioning.x)

    def velocities(x: Tensor, step: int) -> list[Tensor]:
        t_step, dt_step = schedule.timesteps[step], schedule.step_sizes[step]
        t = time_input(t_step, x.device, rounded=compat.bf16_timesteps)
        dt = time_input(dt_step, x.device, rounded=compat.bf16_timesteps)
        modulation = net.modulation(t, dt)
        # The adapter runs before the point where the official multi-GPU code rounds t and dt.
        steering = net.steering(
            features, time_input(t_step, x.device), time_input(dt_step, x.device)
        )
        return net.velocities(x, texts, modulation, positions, steering, on_block)

    x = sample(
        velocities,
        noise,
        schedule.sigmas,
        plan.solver,
        plan.guidance,
        bf16_einsum=compat.bf16_einsum,
    )
    return Latent(x=x)
