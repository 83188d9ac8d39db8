# SPDX-License-Identifier: Apache-2.0
"""The two denoising stages of the official recipe and the step between them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_bench.official import dit, solvers
from pw_runtime.types import StageConfig


def denoise(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    plan: StageConfig,
    noise: Tensor,
    contexts: tuple[Tensor, Tensor],
    condition: Tensor | None = None,
    *,
    attention: dit.Attention,
    bf16: bool = False,
    bf16_einsum: bool = False,
) -> Tensor:
    """Denoise [C, T, h, w] to the clean latent; two passes per step, the prompt's first.

    Everything is on the device of the noise. `contexts` are the text rows of the prompt and its
    negative, each [n, text_dim]; `condition` is the high-res stage's, from `resize_latent`.
    """
    one_pass = partial(
        dit.forward, state, config, condition=condition, attention=attention, bf16=bf16
    )

    def velocity(x: Tensor, t: int, dt: int) -> Tensor:
        step = torch.tensor([float(t)], device=x.device)
        gap = None if condition is None else torch.tensor([float(dt)], device=x.device)
        cond, uncond = (one_pass(x, step, context, dt=gap) for context in contexts)
        return uncond + plan.guidance * (cond - uncond)

    schedule = solvers.schedule(plan.solver, plan.steps, plan.shift)
    return solvers.solve(plan.solver, velocity, noise.float(), schedule, bf16_einsum=bf16_einsum)


def resize_latent(latent: Tensor, plan: StageConfig) -> Tensor:
    """Resize [C, T, h, w] per frame, bilinearly, to the condition of a stage: a cell per token.

    Returns [1, C, T, rows, columns].
    """
    frames = F.interpolate(
        latent.transpose(0, 1),
        size=(plan.height // 32, plan.width // 32),
        mode="bilinear",
        align_corners=False,
    )
    return frames.transpose(0, 1)[None]


def check_noise(noise: Tensor, plan: StageConfig, frames: int) -> None:
    """Raise ValueError unless noise is the latent of `frames` frames at the stage's size."""
    expected = ((frames - 1) // 4 + 1, plan.height // 16, plan.width // 16)
    if tuple(noise.shape[1:]) != expected:
        raise ValueError(f"noise {tuple(noise.shape)} does not fit {expected}")
