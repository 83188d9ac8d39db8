# SPDX-License-Identifier: Apache-2.0
"""The latent space of the built-in model: principal components of blocks of pixels.

Encoder and decoder of the VAE learn this map and its inverse. The transformers learn from it
directly, so that no training has to wait for another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pw_runtime.types import VAE_STRIDE

CHANNELS = 48
POWER = 0.5  # exponent of a component's deviation; 0 would whiten: noise as loud as the picture


@dataclass(frozen=True, slots=True)
class Pca:
    """Affine map between blocks of 4 x 16 x 16 pixels and latent channels."""

    mean: Tensor  # [3072]
    down: Tensor  # [3072, 48]
    up: Tensor  # [48, 3072]

    def encode(self, video: Tensor) -> Tensor:
        """Encode [3, F, height, width] in [-1, 1], F = 4n+1, to a normalised [48, T, H, W]."""
        cells = blocks(video)
        latent = (cells.flatten(0, 2) - self.mean) @ self.down
        return latent.unflatten(0, cells.shape[:3]).permute(3, 0, 1, 2)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode [48, T, H, W] -> [3, F, height, width]."""
        cells = latent.permute(1, 2, 3, 0).flatten(0, 2) @ self.up + self.mean
        return pixels(cells.unflatten(0, latent.shape[1:]))


def blocks(video: Tensor) -> Tensor:
    """Cut [3, F, height, width] into [T, H, W, 3072]; the first frame fills a block alone."""
    ft, fy, fx = VAE_STRIDE
    video = torch.cat((video[:, :1].expand(-1, ft - 1, -1, -1), video), dim=1)
    cut = video.unflatten(3, (-1, fx)).unflatten(2, (-1, fy)).unflatten(1, (-1, ft))
    return cut.permute(1, 3, 5, 0, 2, 4, 6).flatten(3)


def pixels(cells: Tensor) -> Tensor:
    """Invert `blocks`: [T, H, W, 3072] -> [3, F, height, width]."""
    ft, fy, fx = VAE_STRIDE
    cut = cells.unflatten(3, (3, ft, fy, fx)).permute(3, 0, 4, 1, 5, 2, 6)
    return cut.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, ft - 1 :]


def fit_pca(videos: list[Tensor]) -> Pca:
    """Fit to the blocks of clips [3, F, height, width] of any sizes."""
    cells = torch.cat([blocks(video).flatten(0, 2) for video in videos])
    mean = cells.mean(0)
    cells = cells - mean
    variances, vectors = torch.linalg.eigh(cells.T @ cells / len(cells))
    vectors = vectors[:, -CHANNELS:].flip(1)
    deviation = variances[-CHANNELS:].flip(0).clamp_min(1e-8).sqrt()
    strongest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * strongest.sign()  # the sign of an eigenvector is arbitrary: fix it
    target = deviation**POWER
    target *= (CHANNELS / target.square().sum()).sqrt()  # mean variance 1, like the noise
    scale = target / deviation
    return Pca(mean, vectors * scale, (vectors / scale).T.contiguous())
