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

from pw_export.nano.checkpoint import NanoTensors, Tensors
from pw_export.nano.data import CPU, FRAMES, open_pca
from pw_export.nano.pca import Pca
from pw_export.nano.random_weights import NANO_VAE
from pw_export.nano.scenes import Scene, Window, draw_scene, render
from pw_export.nano.trainable_vae import decode_clips, encode_clips
from pw_export.nano.training import Recipe, adopt, train
from pw_runtime.checkpoint.loader import channels_last
from pw_runtime.models import VaeDecoder
from pw_runtime.models.vae import VaeEncoder

VAE = replace(NANO_VAE, encoder_dims=(16, 16, 32, 64, 64), decoder_dims=(64, 64, 32, 32, 16))
BATCH = 2  # whole clips: of short ones, it is not learned what later frames see of earlier ones
SIDE = 64  # pixels; training clips are square
SIZES = ((192, 96), (256, 128), (512, 256), (768, 384))  # of the pictures that they are cut from
SHARES = (3, 4, 3, 1)
CELL = 16
NEAR = 8  # pixels; side of the squares in which edges are as steep as the true ones
ERROR = 0.1  # maximum noise in the decoder's training latents; transformers leave some, too
# Of weights that were trained before: rates as high as from random ones would undo what they know.
DECODER = Recipe(steps=5300, matrix_lr=8e-4, other_lr=6e-4, decay=1.0, ema=0.998, seed=1)
ENCODER = Recipe(steps=900, matrix_lr=1e-3, other_lr=7e-4, decay=1.0, ema=0.998, seed=3)
NEW_ENCODER = Recipe(steps=3400, matrix_lr=3e-3, other_lr=2e-3, decay=1.0, ema=0.998, seed=2)
LATENTS_ALONE = 2000  # steps of a new encoder before its latents are judged by what is decoded
ANCHOR = 0.5  # then weight of the error of the latents, from which the transformers learn
DECODER_PARTS, ENCODER_PARTS = ("decoder.", "conv2."), ("encoder.", "conv1.")


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
        width, height = draw.choices(SIZES, SHARES)[0]
        scene = draw_scene(draw.randrange(10**9), varied=True)
        window = _window(scene, width, height, draw)
        clips.append(render(scene, width, height, FRAMES, window=window))
    return torch.stack(clips)


def _window(scene: Scene, width: int, height: int, draw: random.Random) -> Window:
    moment = draw.uniform(-0.5, 0.5)
    x = (scene.x + scene.dx * moment + draw.uniform(-0.3, 0.3)) / scene.width * width
    y = (scene.y + scene.dy * moment + draw.uniform(-0.3, 0.3)) / scene.height * height
    left, top = (
        min(max(round((centre - SIDE / 2) / CELL), 0), (size - SIDE) // CELL) * CELL
        for centre, size in ((x, width), (y, height))
    )
    return Window(left, top, SIDE, SIDE)


def encode_batch(pca: Pca, clips: Tensor) -> Tensor:
    """Encode [B, 3, F, height, width] -> [B, 48, T, H, W]."""
    return torch.stack([pca.encode(clip) for clip in clips])


def picture_loss(clips: Tensor, true: Tensor) -> Tensor:
    """Compute the error of decoded clips [B, 3, F, height, width] and of their edges.

    Mostly absolute: where an edge could be in two places, the mean of both, which has the smallest
    squared error, is a blur. The last term wants edges as steep as the true ones, within squares.
    """
    error = clips - true
    across, down = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    steepness = (edge_strength(clips) - edge_strength(true)).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * (across + down) + 4 * steepness


def edge_strength(clips: Tensor) -> Tensor:
    """Return the root of the gradient energy of squares, [B F, 3, height / NEAR, width / NEAR]."""
    frames = clips.transpose(1, 2).flatten(0, 1)
    across = frames.diff(dim=-1, append=frames[..., -1:])
    down = frames.diff(dim=-2, append=frames[..., -1:, :])
    return (F.avg_pool2d(across.square() + down.square(), NEAR) + 1e-6).sqrt()


def train_decoder(
    work: Path,
    recipe: Recipe = DECODER,
    device: torch.device = CPU,
    begin: NanoTensors | None = None,
) -> Tensors:
    """Train from random or from other weights, or continue; return the averaged weights."""
    pca, decoder = open_pca(work), VaeDecoder(VAE)
    initialise(decoder, torch.Generator().manual_seed(2))
    if begin is not None:
        adopt(decoder, part(begin.vae, DECODER_PARTS))
    decoder = decoder.to(device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        clips = draw_clips(generator)
        latents = encode_batch(pca, clips)
        error = ERROR * torch.rand(BATCH, 1, 1, 1, 1, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        return picture_loss(
            decode_clips(decoder, (latents + error * noise).to(device)), clips.to(device)
        )

    return train(work, "decoder", decoder, loss, recipe)


def part(vae: Tensors, names: tuple[str, ...]) -> Tensors:
    """Return the weights whose names begin with one of `names`."""
    return {name: weight for name, weight in vae.items() if name.startswith(names)}


def train_encoder(
    work: Path,
    decoder: Tensors,
    recipe: Recipe | None = None,
    device: torch.device = CPU,
    begin: NanoTensors | None = None,
) -> Tensors:
    """Train, or continue a training; return the averaged weights.

    Args:
        work: folder for data, states and logs.
        decoder: averaged weights of the decoder, through which the last steps are judged.
        recipe: steps and learning rates; None: ENCODER, or NEW_ENCODER from random weights.
        device: device to train on.
        begin: weights to begin with, instead of random ones.
    """
    pca, encoder, frozen = open_pca(work), VaeEncoder(VAE), VaeDecoder(VAE)
    initialise(encoder, torch.Generator().manual_seed(3))
    if begin is not None:
        adopt(encoder, part(begin.vae, ENCODER_PARTS))
    frozen.load_state_dict(decoder)
    encoder, frozen = encoder.to(device), frozen.to(device).requires_grad_(False)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        clips = draw_clips(generator)
        latents, true = encode_clips(encoder, clips.to(device)), encode_batch(pca, clips).to(device)
        error = F.mse_loss(latents, true)
        if begin is None and step < LATENTS_ALONE:
            return error
        return ANCHOR * error + picture_loss(decode_clips(frozen, latents), clips.to(device))

    recipe = recipe or (NEW_ENCODER if begin is None else ENCODER)
    return train(work, "encoder", encoder, loss, recipe)
