# SPDX-License-Identifier: Apache-2.0
"""Pixels -> latent: the pictures and videos that a clip starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pw_runtime.models import VaeEncoder
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.finite import is_finite, overflow
from pw_runtime.types import Latent


def encode_picture(encoder: VaeEncoder, picture: Tensor) -> Latent:
    """Encode a picture as the first latent frame of a clip.

    Args:
        encoder: of the VAE.
        picture: [3, 1, height, width] in [-1, 1], sizes multiples of 32.

    Returns:
        [C, 1, H, W] fp32 on the host.

    Raises:
        BadWeights, BadResult: the latent is not finite.
    """
    weight = next(encoder.parameters())
    latent = encoder.latent_frame(picture.to(weight), CausalCache())
    return Latent(x=_finite(encoder, latent).cpu())


def encode_video(
    encoder: VaeEncoder, chunks: Callable[[], Iterable[Tensor]], advance: Callable[[], object]
) -> Latent:
    """Encode a video, one latent frame after the other; no more than one chunk is in memory.

    Args:
        encoder: of the VAE.
        chunks: returns the video from its beginning: [3, 1, height, width] in [-1, 1] first, then
            [3, 4, height, width] each; sizes multiples of 32.
        advance: called after each latent frame.

    Returns:
        [C, T, H, W] fp32 on the host.

    Raises:
        BadWeights, BadResult: the latent is not finite.
    """
    weight, cache = next(encoder.parameters()), CausalCache()
    frames = []
    for chunk in chunks():
        frames.append(_finite(encoder, encoder.latent_frame(chunk.to(weight), cache)).cpu())
        advance()
    return Latent(x=torch.cat(frames, dim=1))


def _finite(encoder: VaeEncoder, latent: Tensor) -> Tensor:
    """Return a latent. Raises BadWeights, BadResult where it is not finite."""
    if not is_finite(latent):
        encoder.check_weights()
        raise overflow("the latent of the picture or video")
    return latent
