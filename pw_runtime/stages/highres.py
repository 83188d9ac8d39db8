# SPDX-License-Identifier: Apache-2.0
"""Text context and conditioning -> high-res latent, in a few shortcut steps from pure noise."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pw_runtime.schedule import make_schedule, time_input
from pw_runtime.segmented import SegmentedDiT
from pw_runtime.solver import sample
from pw_runtime.types import Compat, Conditioning, Latent, StagePlan, TextContext


def highres(
    text: TextContext,
    conditioning: Conditioning,
    noise: Tensor,
    plan: StagePlan,
    compat: Compat,
    net: SegmentedDiT,
    on_step: Callable[[], None],
) -> Latent:
    """Denoise at full resolution; every step also tells the network how far it will go (dt).

    Args:
        text: context of the prompt and of its negative.
        conditioning: resized draft latent, on the network's device.
        noise: [C, T, H, W] fp32 on the network's device.
        plan: sampler settings.
        compat: official quirks.
        net: the high-res transformer with adapter and dt embedding.
        on_step: called after each step.

    Returns:
        [C, T, H, W] fp32 latent.
    """
    schedule = make_schedule(plan.solver, plan.steps, plan.shift)
    cond, uncond = net.text_keys_values(text.cond), net.text_keys_values(text.uncond)
    positions = net.positions(noise)
    features = net.draft_features(conditioning.x)

    def velocities(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        t_step, dt_step = schedule.timesteps[step], schedule.step_sizes[step]
        t = time_input(t_step, x.device, rounded=compat.bf16_timesteps)
        dt = time_input(dt_step, x.device, rounded=compat.bf16_timesteps)
        modulation = net.modulation(t, dt)
        # The adapter runs before the point where the official multi-GPU code rounds t and dt.
        controls = net.controls(
            features, time_input(t_step, x.device), time_input(dt_step, x.device)
        )
        v_cond = net(x, cond, modulation, positions, controls)
        return v_cond, net(x, uncond, modulation, positions, controls)

    x = sample(
        velocities,
        noise,
        schedule.sigmas,
        plan.solver,
        plan.guidance,
        bf16_einsum=compat.bf16_einsum,
        on_step=on_step,
    )
    return Latent(x=x)
