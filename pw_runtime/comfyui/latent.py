# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's IMAGE, and its LATENT for Wan2.2: what lies between its sampler and its VAE.

A LATENT is {"samples": [B, C, T, H, W]} in the VAE's own space: x * std + mean for our normalised
x, as `process_out` of its format Wan22 has it. That rounds, so that our x also goes along, and is
taken where the samples are still those that were made of it.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pw_runtime.errors import BadRequest
from pw_runtime.types import VaeConfig

SAMPLES: Final = "samples"
NORMALISED: Final = "pixelwizard_normalised"


def to_comfy(x: torch.Tensor, vae: VaeConfig) -> dict[str, torch.Tensor]:
    """Return the LATENT of a normalised latent, [C, T, H, W]."""
    return {SAMPLES: _raw(x, vae)[None], NORMALISED: x[None]}


def from_comfy(latent: dict[str, Any], vae: VaeConfig) -> torch.Tensor:
    """Return the normalised latent, [C, T, H, W] fp32 on the CPU, of a LATENT.

    Raises BadRequest for several clips, a mask, or a latent of another VAE.
    """
    samples = latent[SAMPLES]
    if samples.ndim != 5 or samples.shape[:2] != (1, vae.z_dim):
        raise BadRequest(
            "the LATENT is not one clip of the Wan2.2 VAE",
            got=f"samples of shape {list(samples.shape)}",
            wanted=f"[1, {vae.z_dim}, frames, rows, columns]",
            do="connect the latent of one clip of this model",
        )
    if latent.get("noise_mask") is not None:
        raise BadRequest(
            "masks are not supported", got="a LATENT with noise_mask", do="remove the mask"
        )
    raw = samples[0].to("cpu", torch.float32)
    kept = latent.get(NORMALISED)
    if kept is not None and torch.equal(_raw(kept[0], vae), raw):
        return kept[0]
    mean, std = _statistics(vae)
    return (raw - mean) / std


def picture_of(image: torch.Tensor) -> NDArray[np.uint8]:
    """Return the picture of an IMAGE of one frame, [1, H, W, 3] in 0 to 1: [H, W, 3] uint8.

    Raises BadRequest for another shape.
    """
    if image.ndim != 4 or image.shape[0] != 1 or image.shape[3] != 3:
        raise BadRequest(
            "the IMAGE is not one picture",
            got=f"shape {list(image.shape)}",
            wanted="[1, height, width, 3]",
            do="take one frame of it, without its mask",
        )
    levels = image[0].to("cpu", torch.float32).mul(255).round().clamp(0, 255)
    pixels: NDArray[np.uint8] = levels.to(torch.uint8).numpy()
    return pixels


def _raw(x: torch.Tensor, vae: VaeConfig) -> torch.Tensor:
    mean, std = _statistics(vae)
    return x * std + mean


def _statistics(vae: VaeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each channel, [C, 1, 1, 1] fp32."""
    mean, std = (torch.tensor(values) for values in (vae.latent_mean, vae.latent_std))
    return mean[:, None, None, None], std[:, None, None, None]
