# SPDX-License-Identifier: Apache-2.0
"""Train the high-res transformer from the draft transformer, as PixelWizard does, at four sizes.

It is conditioned on the size of a step (dt) and on the draft latent, resized to its token grid.
Most clips of a batch train the velocity itself, with the smallest dt; the others train one step of
dt to equal two steps of half its size. Shortcut models (Frans et al. 2024) take those two steps
with dt/2; here both are plain velocities, because predictions for long steps diverged from those
for short ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from pw_export.nano.captions import make_tokenizer
from pw_export.nano.checkpoint import NanoTensors, Tensors
from pw_export.nano.data import (
    CPU,
    DRAFT_SIZES,
    HD_SIZE,
    HIGHRES_SIZES,
    Size,
    draw_indices,
    draw_texts,
    noise_levels,
    odds,
    open_latents,
    open_pca,
    tokens,
    training_scenes,
)
from pw_export.nano.mistakes import mistaken
from pw_export.nano.pca import Pca
from pw_export.nano.scenes import SHAPES, SQUARE, TALL, WIDE, Scene
from pw_export.nano.train_draft import DIT, TEXT_ENCODER, TextToLatent, initial_dit
from pw_export.nano.trainable import encode_texts, velocities
from pw_export.nano.training import Recipe, adopt, train
from pw_runtime.models import WanDiT
from pw_runtime.types import PATCH

HIGHRES = replace(DIT, has_dt=True, adapter_dim=48, control_blocks=(1,))
SCENES = {WIDE: 12_000, SQUARE: 1_000, TALL: 1_000}


@dataclass(frozen=True, slots=True)
class Batch:
    """Clips of a step: their number, the size that they all have, and the shift of their noise."""

    count: int
    aspect: float
    size: Size
    shift: float = 5.0  # few steps of the sampler are at low noise


USUAL = Batch(12, WIDE, HIGHRES_SIZES[WIDE])
HD = Batch(3, WIDE, HD_SIZE, shift=10.0)  # twice the side: as much noise hides less
SQUARES, TALLS = (Batch(12, aspect, HIGHRES_SIZES[aspect]) for aspect in (SQUARE, TALL))
BATCHES = (HD, USUAL, HD, HD, HD, SQUARES, HD, HD, USUAL, HD, HD, TALLS)  # in turn
JUMPS = 0.25  # share of clips that train long steps
ASTRAY = 0.2  # share of drafts that show any shape, so that the text decides the shape
MISTAKEN = 0.45  # share of drafts with one of the other mistakes
MISTAKES = 2  # kept of each scene
SMALLEST = 2.0  # dt of all other clips, in thousandths
BLUR = 0.8  # maximum noise that the draft network removes from a latent before it conditions
RECIPE = Recipe(steps=700, matrix_lr=0.001, other_lr=3e-4, decay=1.0, seed=12)


@dataclass(frozen=True, slots=True)
class Teacher:
    """Frozen networks that produce texts and drafts like those of a run."""

    model: TextToLatent
    tokenizer: Tokenizer
    device: torch.device

    def texts(self, scenes: list[Scene], generator: torch.Generator) -> Tensor:
        """Encode captions of scenes, [B, TEXT_LEN, text_dim]."""
        ids, mask = tokens(self.tokenizer, draw_texts(scenes, generator), self.device)
        return encode_texts(self.model.text, ids, mask)

    def drafts(self, clean: Tensor, texts: Tensor, generator: torch.Generator) -> Tensor:
        """Blur latents [B, C, T, h, w]: add some noise and let the draft network remove it."""
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        sigma = BLUR * torch.rand(len(clean), generator=generator).to(self.device)
        sigma = sigma.view(-1, 1, 1, 1, 1)
        noisy = torch.lerp(clean, noise, sigma)
        return noisy - sigma * velocities(self.model.dit, noisy, 1000 * sigma.flatten(), texts)


def initial_highres(draft: Tensors) -> WanDiT:
    """Return the draft network with an adapter and a dt embedding that have no effect yet."""
    net = WanDiT(HIGHRES)
    fresh = initial_dit(HIGHRES, torch.Generator().manual_seed(5), "highres")
    net.load_state_dict(fresh | draft)
    return net


def jump_targets(
    net: WanDiT, noisy: Tensor, t: Tensor, dt: Tensor, texts: Tensor, drafts: Tensor
) -> Tensor:
    """Return the mean velocity of two plain steps of dt / 2 from t, [B, C, T, H, W]."""
    with torch.no_grad():
        half, plain = dt / 2, torch.full_like(dt, SMALLEST)
        first = velocities(net, noisy, t, texts, plain, drafts)
        middle = noisy - first * (half / 1000).view(-1, 1, 1, 1, 1)
        return (first + velocities(net, middle, t - half, texts, plain, drafts)) / 2


def on_token_grid(drafts: Tensor, size: Size) -> Tensor:
    """Resize [B, C, T, h, w] to the token grid, as `stages.condition` does."""
    grid = (size[1] // (16 * PATCH), size[0] // (16 * PATCH))
    frames = drafts.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, size=grid, mode="bilinear", align_corners=False)
    return frames.unflatten(0, (len(drafts), -1)).transpose(1, 2)


def draft_kinds(scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """Draw which draft of `_drafts` conditions each clip, [B]: mostly those of the scenes."""
    shown = torch.tensor([SHAPES.index(scene.shape) for scene in scenes])
    chance = torch.rand(shown.shape, generator=generator)
    shape = torch.randint(len(SHAPES), shown.shape, generator=generator)
    mistake = torch.randint(MISTAKES, shown.shape, generator=generator) + len(SHAPES)
    shown = torch.where(chance < ASTRAY + MISTAKEN, shape, shown)
    return torch.where(chance < MISTAKEN, mistake, shown)


def train_highres(
    work: Path,
    draft: Tensors,
    recipe: Recipe = RECIPE,
    device: torch.device = CPU,
    begin: NanoTensors | None = None,
) -> Tensors:
    """Train, or continue a training; return the averaged weights.

    Args:
        work: folder for data, states and logs.
        draft: averaged weights of `TextToLatent`.
        recipe: steps and learning rates.
        device: device to train on.
        begin: weights to begin with, instead of those of the draft network.
    """
    pca = open_pca(work)
    scenes = {aspect: training_scenes(count, aspect) for aspect, count in SCENES.items()}
    lows = {aspect: _drafts(work, pca, aspect, clips) for aspect, clips in scenes.items()}
    weights = {aspect: odds(clips) for aspect, clips in scenes.items()}
    highs = {b.size: open_latents(work, pca, b.size, scenes[b.aspect]) for b in BATCHES}
    teacher = Teacher(TextToLatent(DIT, TEXT_ENCODER).to(device), make_tokenizer(), device)
    teacher.model.load_state_dict(draft)
    teacher.model.requires_grad_(False)
    net = initial_highres(teacher.model.dit.state_dict())
    if begin is not None:
        adopt(net, begin.highres)
    net = net.to(device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        batch = BATCHES[step % len(BATCHES)]
        indices = draw_indices(weights[batch.aspect], batch.count, generator)
        clips = [scenes[batch.aspect][int(i)] for i in indices]
        texts = teacher.texts(clips, generator)
        low = lows[batch.aspect][indices, draft_kinds(clips, generator)].to(device, torch.float32)
        drafts = on_token_grid(teacher.drafts(low, texts, generator), batch.size)
        clean = highs[batch.size][indices].to(device, torch.float32)
        return shortcut_loss(net, clean, texts, drafts, batch.shift, generator)

    return train(work, "highres", net, loss, recipe)


def _drafts(work: Path, pca: Pca, aspect: float, scenes: list[Scene]) -> Tensor:
    """Load drafts of scenes: the (first) shape as each of SHAPES, then MISTAKES others.

    Returns:
        [N, 3 + MISTAKES, C, T, h, w] fp16.
    """
    size = DRAFT_SIZES[aspect]
    clips = [replace(scene, shape=shape) for scene in scenes for shape in SHAPES]
    shapes = open_latents(work, pca, size, clips, "drafts")
    draw = random.Random(len(scenes))
    clips = [mistaken(scene, draw) for scene in scenes for _ in range(MISTAKES)]
    mistakes = open_latents(work, pca, size, clips, "mistakes")
    kinds = [latents.unflatten(0, (len(scenes), -1)) for latents in (shapes, mistakes)]
    return torch.cat(kinds, dim=1)


def shortcut_loss(
    net: WanDiT,
    clean: Tensor,
    texts: Tensor,
    drafts: Tensor,
    shift: float,
    generator: torch.Generator,
) -> Tensor:
    """Compute the loss: flow matching for most clips of a batch, long steps for the others."""
    count, device = len(clean), clean.device
    noise = torch.randn(clean.shape, generator=generator).to(device)
    sigma = noise_levels(count, shift, generator)
    sigma = sigma[torch.randperm(count, generator=generator)].to(device)
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
    t, target = 1000 * sigma, noise - clean
    # The first clips, whose sigma is as random as that of others. A compiled block is one for their
    # number, so that it should not vary much.
    jumps = int(JUMPS * count + torch.rand((), generator=generator))
    length = torch.rand(count, generator=generator).to(device)  # as a fraction of t
    length[jumps:] = 0
    dt = SMALLEST + length * (t - SMALLEST).clamp_min(0)
    if jumps:
        target[:jumps] = jump_targets(net, *(x[:jumps] for x in (noisy, t, dt, texts, drafts)))
    return F.mse_loss(velocities(net, noisy, t, texts, dt, drafts), target)
