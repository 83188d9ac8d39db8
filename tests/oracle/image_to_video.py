# SPDX-License-Identifier: Apache-2.0
"""The official image-to-video loop of TI2V-5B in fp32, a timestep per token.

Source: wan/textimage2video.py (i2v); shared/spec/formats.md, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pw_bench.official import dit, solvers
from pw_runtime.types import StageConfig


@torch.no_grad()
def denoise_from_picture(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    plan: StageConfig,
    noise: Tensor,
    picture: Tensor,
    contexts: tuple[Tensor, Tensor],
    condition: Tensor | None = None,
) -> Tensor:
    """Denoise [C, T, h, w] with `picture`, [C, 1, h, w], as the first latent frame.

    `condition` is the high-res stage's, [1, C, T, h/2, w/2]. The official network has no such loop
    in that stage: there the adapter gets the timestep of the frames that are made.
    """
    mask = torch.ones_like(noise)
    mask[:, 0] = 0

    def blended(latent: Tensor) -> Tensor:
        return (1 - mask) * picture + mask * latent

    def velocity(x: Tensor, t: int, dt: int) -> Tensor:
        per_token = (mask[0][:, ::2, ::2] * t).flatten()
        cond, uncond = (_forward(state, config, x, per_token, c, condition, dt) for c in contexts)
        return uncond + plan.guidance * (cond - uncond)

    schedule = solvers.schedule(plan.solver, plan.steps, plan.shift)
    solve = solvers.unipc if plan.solver == "unipc" else solvers.dpmpp
    begun = latent = blended(noise)
    for latent in solve(velocity, begun, schedule):
        latent.copy_(blended(latent))  # what the solver goes on with
    return latent


def _forward(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    x: Tensor,
    t: Tensor,
    context: Tensor,
    condition: Tensor | None,
    dt: int,
) -> Tensor:
    if condition is None:
        return dit.forward(state, config, x, t, context)
    w = dit.Weights(state, config)
    gap, step = torch.tensor([float(dt)]), t[-1:]
    added = dit.controls(w, condition, step, gap)
    e, e0 = dit.time_vectors(w, t, gap.expand(len(t)))
    patches = w.conv("patch_embedding", x[None], (1, 2, 2))[0]
    grid = (patches.shape[1], patches.shape[2], patches.shape[3])
    rows, text = patches.flatten(1).T, dit.text_keys(w, context)
    axes = dit.rope_axes(grid, config["dim"] // config["num_heads"], x.device)
    for index in range(config["num_layers"]):
        rows = dit.block(w, index, rows + added.get(index, 0), e0, text, axes)
    shift, scale = (w.held("head.modulation").float() + e[:, None]).unbind(dim=1)
    return dit.unpatchify(w.linear_fp32("head.head", w.modulated(rows, shift, scale)), grid)
