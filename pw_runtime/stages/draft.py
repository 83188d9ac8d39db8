# SPDX-License-Identifier: Apache-2.0
"""Text context -> draft latent: structure and motion, at low resolution."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pw_runtime.execution.protocols import Transformer
from pw_runtime.sampling.denoise import denoise
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

    Returns:
        [C, T, H, W] fp32 latent.
    """
    return denoise(net, text, noise, config, compat, on_step, step_cache=step_cache, notice=notice)
