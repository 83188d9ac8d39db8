# SPDX-License-Identifier: Apache-2.0
"""Noise -> latent: the denoising loop of both stages.

A clip may start from a picture: its first latent frame is then known. As officially
(wan/textimage2video.py), that frame is written into the latent before the first step and after
every one, and the network is told that its tokens are at timestep 0. The solver works number by
number, so nothing else has to know.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pw_runtime.execution.protocols import ControlInputs, Transformer
from pw_runtime.models.finite import is_finite, overflow
from pw_runtime.sampling.guidance_reuse import GuidanceReuse
from pw_runtime.sampling.loop_state import LoopState, NoLog, StepLog
from pw_runtime.sampling.schedule import make_schedule, time_input
from pw_runtime.sampling.solver import Velocities, sample
from pw_runtime.sampling.step_cache import StepCache
from pw_runtime.types import Compat, Conditioning, Latent, StageConfig, TextContext


def denoise(
    net: Transformer,
    text: TextContext,
    noise: Tensor,
    config: StageConfig,
    compat: Compat,
    on_step: Callable[[float], None],
    conditioning: Conditioning | None = None,
    step_cache: float | None = None,
    guidance_reuse: int = 0,
    notice: Callable[[str], None] = lambda text: None,
    log: StepLog | None = None,
    fixed: Tensor | None = None,
    first: int = 0,
) -> Latent:
    """Denoise with classifier-free guidance.

    At guidance 1 a step is one pass with the prompt, at 0 one with its negative.

    Args:
        net: the transformer.
        text: context of the prompt and of its negative.
        noise: [C, T, H, W] fp32 on the network's device.
        config: sampler settings.
        compat: official quirks.
        on_step: called after each block, with the fraction of a step that it is.
        conditioning: resized draft latent, for a shortcut network, which is also given the size
            of every step (dt).
        step_cache: extrapolate velocities that change by less than this: see `StepCache`; None
            computes every step.
        guidance_reuse: steps after the first that run no negative pass: see `GuidanceReuse`.
        notice: told how many steps were extrapolated, where step_cache is given.
        log: keeps the state between steps, and has the one to go on from.
        fixed: [C, 1, H, W] fp32 on the network's device, the first latent frame; None: it is made,
            as the others.
        first: step at whose noise level `noise` is; the steps before it are not computed, and the
            solver begins there as it does at step 0, without a past.

    Returns:
        [C, T, H, W] fp32 latent.

    Raises:
        BadWeights, BadResult: a velocity is not finite: because of weights, or because finite
            ones are too large for the arithmetic. The first step of a batch shows it.
    """
    schedule = make_schedule(config.solver, config.steps, config.shift)
    # All before the first text: a failure between two would leave other ranks with one of them.
    contexts = [text.of(name).to(noise.device) for name in config.passes]
    texts = [net.text_keys_values(context) for context in contexts]
    layout = net.layout(noise, clean=0 if fixed is None else fixed.shape[1])
    features = None if conditioning is None else net.control_features(conditioning.x)
    block_fraction = 1 / sum(map(len, texts))  # of a step

    texts_of = {count: texts[:count] for count in range(1, len(texts) + 1)}  # the same each step

    def velocities(x: Tensor, step: int, passes: int = len(texts)) -> list[Tensor]:
        t, dt, control = schedule.timesteps[step], schedule.step_sizes[step], None
        if features is not None:
            control = _control(net, features, t, dt)
        times = partial(time_input, device=x.device, rounded=compat.bf16_timesteps)
        # Of the first latent frame, where that is known, and of the others.
        rows = (0, t) if fixed is not None else (t,)
        modulation = net.modulation(
            torch.cat([times(row) for row in rows]),
            None if features is None else times(dt).expand(len(rows)),
        )
        results = net.velocities(
            x, texts_of[passes], modulation, layout, control, lambda: on_step(block_fraction)
        )
        if passes < len(texts):
            on_step(1 - passes / len(texts))
        if not all(map(is_finite, results)):
            net.check_weights()
            raise overflow(f"the velocity of step {step + 1}")
        return results

    log = log or NoLog()
    run: Velocities = velocities
    reuse = cache = None
    if guidance_reuse:
        reuse = GuidanceReuse(velocities, guidance_reuse)
        run = reuse.velocities
    if step_cache is not None:
        guidance = (schedule.sigmas, config.guidance)
        cache = StepCache(run, *guidance, step_cache, partial(on_step, 1))
        run = cache.velocities
    stateful = [part for part in (reuse, cache) if part is not None]
    start = log.begin()
    if start is not None:
        for part in stateful:
            part.restore(start)

    def keep(state: LoopState) -> None:
        for part in stateful:
            state = state.extended(*part.state())
        log.keep(state)

    def settle(x: Tensor) -> None:
        if fixed is not None:
            x[:, : fixed.shape[1]] = fixed

    if fixed is not None:
        noise = noise.clone()
        settle(noise)
    x = sample(
        lambda x, step: run(x, first + step),
        noise,
        schedule.sigmas[first:],
        config.solver,
        config.guidance,
        bf16_einsum=compat.bf16_einsum,
        start=start,
        between_steps=keep,
        settle=settle,
    )
    if not is_finite(x):
        raise overflow("the latent")
    if cache is not None:
        steps = f"{cache.skipped} of {config.steps - first} steps"
        notice(f"{steps} extrapolated, --step-cache {step_cache}")
    return Latent(x=x)


def _control(net: Transformer, features: Tensor, t: int, dt: int) -> ControlInputs:
    """Collect the control of a step. The official adapter runs before t and dt are rounded.

    It sees one timestep for the whole clip: that of the frames that are made.
    """
    device = features.device
    return net.control_inputs(features, time_input(t, device), time_input(dt, device))
