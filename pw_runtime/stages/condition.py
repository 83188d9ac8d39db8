# SPDX-License-Identifier: Apache-2.0
"""Draft latent -> conditioning of the high-res network."""

from __future__ import annotations

import torch.nn.functional as F

from pw_runtime.types import PATCH, VAE_STRIDE, Conditioning, Latent, StageConfig


def resize_draft(draft: Latent, config: StageConfig) -> Conditioning:
    """Resize every latent frame to the high-res token grid (bilinear, corners not aligned).

    Source: _interpolate_cond_latent in PixelWizard's generate.py.

    Args:
        draft: [C, T, h, w].
        config: the high-res stage.

    Returns:
        [C, T, H/2, W/2], with H, W the latent size of the high-res stage.
    """
    size = (config.height // (VAE_STRIDE[1] * PATCH), config.width // (VAE_STRIDE[2] * PATCH))
    frames = draft.x.transpose(0, 1)  # [T, C, h, w]
    frames = F.interpolate(frames, size=size, mode="bilinear", align_corners=False)
    return Conditioning(x=frames.transpose(0, 1).contiguous())
