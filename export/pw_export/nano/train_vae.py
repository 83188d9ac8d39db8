# SPDX-License-Identifier: Apache-2.0
"""Train decoder and encoder of the VAE, separately, to compute the principal components."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pw_export.nano import data
from pw_export.nano.data import CPU, VAE_SIZES, open_pca
from pw_export.nano.pca import Pca
from pw_export.nano.random_weights import NANO_VAE
from pw_export.nano.scenes import ASPECT, Scene, Window, draw_scene, render
from pw_export.nano.trainable_vae import decode_clips, encode_clips
from pw_export.nano.training import Recipe, train
from pw_runtime.checkpoint.loader import channels_last
from pw_runtime.models import VaeDecoder
from pw_runtime.models.vae import VaeEncoder

VAE = replace(NANO_VAE, encoder_dims=(16, 16, 16, 32, 32), decoder_dims=(64, 64, 32, 32, 16))
BATCH = 3
FRAMES = 9  # per training clip
SIDE = 64  # pixels; training clips are square
CELL = 16
ERROR = 0.1  # maximum noise in the decoder's training latents; transformers leave some, too
DECODER = Recipe(steps=3500, matrix_lr=3e-3, other_lr=2e-3, ema=0.995, seed=1)
ENCODER = Recipe(steps=2000, matrix_lr=3e-3, other_lr=2e-3, ema=0.995, seed=2)


def initialise(net: nn.Module, generator: torch.Generator) -> None:
    """Initialise weights: residual branches are zero, resampling is the identity."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif name.endswith("gamma"):
                weight.fill_(1.0)
            elif "residual.6" in name or "middle.1.proj" in name:
                weight.zero_()
            elif "resample" in name or "time_conv" in name:
                weight.zero_()
                centre = weight[..., -1, 0, 0] if "time_conv" in name else weight[..., 1, 1]
                channels = weight.shape[1]
                centre.copy_(torch.eye(channels).repeat(len(weight) // channels, 1))
            else:
                weight.normal_(std=1 / math.sqrt(weight[0].numel()), generator=generator)
            weight.data = channels_last(weight.data)


def draw_clips(generator: torch.Generator) -> Tensor:
    """Draw [BATCH, 3, FRAMES, SIDE, SIDE] crops from clips of all sizes, around the shape."""
    draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
    clips = []
    for _ in range(BATCH):
        width, height = draw.choices(VAE_SIZES, (1, 4, 2))[0]
        scene = draw_scene(draw.randrange(10**9))
        window = _window(scene, width, height, draw)
        crop = render(scene, width, height, data.FRAMES, window=window)
        start = draw.randrange(data.FRAMES - FRAMES + 1)
        clips.append(crop[:, start : start + FRAMES])
    return torch.stack(clips)


def _window(scene: Scene, width: int, height: int, draw: random.Random) -> Window:
    moment = draw.uniform(-0.5, 0.5)
    x = (scene.x + scene.dx * moment + draw.uniform(-0.3, 0.3)) / ASPECT * width
    y = (scene.y + scene.dy * moment + draw.uniform(-0.3, 0.3)) * height
    left, top = (
        min(max(round((centre - SIDE / 2) / CELL), 0), (size - SIDE) // CELL) * CELL
        for centre, size in ((x, width), (y, height))
    )
    return Window(left, top, SIDE, SIDE)


def encode_batch(pca: Pca, clips: Tensor) -> Tensor:
    """Encode [B, 3, F, height, width] -> [B, 48, T, H, W]."""
    return torch.stack([pca.encode(clip) for clip in clips])


def train_decoder(
    work: Path, recipe: Recipe = DECODER, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Train, or continue a training; return the averaged weights."""
    pca, decoder = open_pca(work), VaeDecoder(VAE)
    initialise(decoder, torch.Generator().manual_seed(2))
    decoder = decoder.to(device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        clips = draw_clips(generator)
        latents = encode_batch(pca, clips)
        error = ERROR * torch.rand(BATCH, 1, 1, 1, 1, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        difference = decode_clips(decoder, (latents + error * noise).to(device)) - clips.to(device)
        return difference.abs().mean() + 4 * difference.square().mean()

    return train(work, "decoder", decoder, loss, recipe)


def train_encoder(
    work: Path, recipe: Recipe = ENCODER, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Train, or continue a training; return the averaged weights."""
    pca, encoder = open_pca(work), VaeEncoder(VAE)
    initialise(encoder, torch.Generator().manual_seed(3))
    encoder = encoder.to(device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        clips = draw_clips(generator)
        latents = encode_batch(pca, clips).to(device)
        return F.mse_loss(encode_clips(encoder, clips.to(device)), latents)

    return train(work, "encoder", encoder, loss, recipe)
