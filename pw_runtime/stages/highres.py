# SPDX-License-Identifier: Apache-2.0
"""Text context and conditioning -> high-res latent, in a few shortcut steps from pure noise."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pw_runtime.execution.protocols import Transformer
from pw_runtime.sampling.denoise import denoise
from pw_runtime.sampling.loop_state import StepLog
from pw_runtime.types import Compat, Conditioning, Latent, StageConfig, TextContext


def denoise_highres(
    net: Transformer,
    text: TextContext,
    conditioning: Conditioning,
    noise: Tensor,
    config: StageConfig,
    compat: Compat,
    on_step: Callable[[float], None],
    guidance_reuse: int = 0,
    log: StepLog | None = None,
    fixed: Tensor | None = None,
) -> Latent:
    """Denoise at full resolution, steered by the draft; the network also gets each step's size.

    Args:
        net: the high-res transformer, with adapter and dt embedding.
        text: context of the prompt and of its negative.
        conditioning: resized draft latent, on the network's device.
        noise: [C, T, H, W] fp32 on the network's device.
        config: sampler settings.
        compat: official quirks.
        on_step: called after each block, with the fraction of a step that it is.
        guidance_reuse: see `denoise`.
        log: keeps the state between steps, and has the one to go on from.
        fixed: see `denoise`; this network was not trained with a first frame that is known.

    Returns:
        [C, T, H, W] fp32 latent.
    """
    inputs = (text, noise, config, compat, on_step, conditioning)
    return denoise(net, *inputs, guidance_reuse=guidance_reuse, log=log, fixed=fixed)
