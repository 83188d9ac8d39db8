# SPDX-License-Identifier: Apache-2.0
"""Train the high-res transformer from the draft transformer, PixelWizard's way.

It is told how far a step will go (dt) and sees the draft's latent on its token grid. Most clips of
a batch learn the velocity itself, with the smallest dt; the others learn that one step of dt is two
of half its length. Shortcut models (Frans et al. 2024) take those two with dt/2; here both are
plain velocities, because what the network said of long steps ran away from what it says of short
ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from pw_export.nano.captions import make_tokenizer
from pw_export.nano.data import (
    CPU,
    DRAFT_SIZE,
    HIGHRES_SIZES,
    draw_texts,
    noise_levels,
    open_latents,
    open_pca,
    tokens,
    training_scenes,
)
from pw_export.nano.scenes import SHAPES, Scene
from pw_export.nano.train_draft import DIT, TEXT_ENCODER, TextToLatent, initial_dit
from pw_export.nano.trainable import encode_texts, velocities
from pw_export.nano.training import Recipe, train
from pw_runtime.models import WanDiT
from pw_runtime.types import PATCH

HIGHRES = replace(DIT, has_dt=True, adapter_dim=48, control_blocks=(1,))
SCENES = 2_400
BATCH, LARGE_BATCH = 12, 3
LARGE_EVERY = 4  # steps: one of them is on the pictures of nano-hd
JUMPS = 0.25  # share of the clips that learn long steps
ASTRAY = 0.3  # share of the drafts whose shape is drawn anew: the text has the last word on it
SHIFT = 3.0
SMALLEST = 2.0  # dt of what is no jump, in thousandths
BLUR = 0.8  # most noise that the draft network takes out of a latent before it conditions
RECIPE = Recipe(steps=2000, matrix_lr=0.004, other_lr=1e-3, seed=4)


@dataclass(frozen=True, slots=True)
class Teacher:
    """Networks that do not learn: they make texts and drafts such as a run makes."""

    both: TextToLatent
    tokenizer: Tokenizer
    device: torch.device

    def texts(self, scenes: list[Scene], generator: torch.Generator) -> Tensor:
        """[B, TEXT_LEN, text_dim] of captions."""
        ids, mask = tokens(self.tokenizer, draw_texts(scenes, generator), self.device)
        return encode_texts(self.both.text, ids, mask)

    def drafts(self, clean: Tensor, texts: Tensor, generator: torch.Generator) -> Tensor:
        """[B, C, T, h, w] latents, as the draft network sees them through more or less noise."""
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        sigma = BLUR * torch.rand(len(clean), generator=generator).to(self.device)
        sigma = sigma.view(-1, 1, 1, 1, 1)
        noisy = torch.lerp(clean, noise, sigma)
        return noisy - sigma * velocities(self.both.dit, noisy, 1000 * sigma.flatten(), texts)


def initial_highres(draft: dict[str, Tensor]) -> WanDiT:
    """The draft network with an adapter and a dt embedding that change nothing yet."""
    net = WanDiT(HIGHRES)
    fresh = initial_dit(HIGHRES, torch.Generator().manual_seed(5), "highres")
    net.load_state_dict(fresh | draft)
    return net


def jump_targets(
    net: WanDiT, noisy: Tensor, t: Tensor, dt: Tensor, texts: Tensor, drafts: Tensor
) -> Tensor:
    """Mean velocity of two plain steps from t that together go dt; [B, C, T, H, W]."""
    with torch.no_grad():
        half, plain = dt / 2, torch.full_like(dt, SMALLEST)
        first = velocities(net, noisy, t, texts, plain, drafts)
        middle = noisy - first * (half / 1000).view(-1, 1, 1, 1, 1)
        return (first + velocities(net, middle, t - half, texts, plain, drafts)) / 2


def on_token_grid(drafts: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, T, h, w] -> [B, C, T, rows, columns] of tokens, as `stages.condition` resizes."""
    grid = (size[1] // (16 * PATCH), size[0] // (16 * PATCH))
    frames = drafts.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, size=grid, mode="bilinear", align_corners=False)
    return frames.unflatten(0, (len(drafts), -1)).transpose(1, 2)


def draft_shapes(shown: list[Scene], generator: torch.Generator) -> Tensor:
    """[B] places in SHAPES of what drafts of scenes show: mostly the scene's own."""
    own = torch.tensor([SHAPES.index(scene.shape) for scene in shown])
    drawn = torch.randint(len(SHAPES), own.shape, generator=generator)
    return torch.where(torch.rand(own.shape, generator=generator) < ASTRAY, drawn, own)


def train_highres(
    work: Path, draft: dict[str, Tensor], recipe: Recipe = RECIPE, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Train from where an earlier call stopped; the averaged weights.

    Args:
        work: folder of data, states and logs.
        draft: averaged weights of `TextToLatent`.
        recipe: how long and how fast.
        device: where.
    """
    pca, scenes = open_pca(work), training_scenes(SCENES)
    in_all_shapes = [replace(scene, shape=shape) for scene in scenes for shape in SHAPES]
    low = open_latents(work, pca, DRAFT_SIZE, in_all_shapes).unflatten(0, (SCENES, len(SHAPES)))
    high, large = (open_latents(work, pca, size, scenes) for size in HIGHRES_SIZES)
    teacher = Teacher(TextToLatent(DIT, TEXT_ENCODER).to(device), make_tokenizer(), device)
    teacher.both.load_state_dict(draft)
    teacher.both.requires_grad_(False)
    net = initial_highres(teacher.both.dit.state_dict()).to(device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        latents, count, size = high, BATCH, HIGHRES_SIZES[0]
        if step % LARGE_EVERY == LARGE_EVERY - 1:
            latents, count, size = large, LARGE_BATCH, HIGHRES_SIZES[1]
        picked = torch.randint(SCENES, (count,), generator=generator)
        shown = [scenes[int(i)] for i in picked]
        texts = teacher.texts(shown, generator)
        shapes = draft_shapes(shown, generator)
        drafts = teacher.drafts(low[picked, shapes].to(device, torch.float32), texts, generator)
        seen = on_token_grid(drafts, size)
        clean = latents[picked].to(device, torch.float32)
        return shortcut_loss(net, clean, texts, seen, generator)

    return train(work, "highres", net, loss, recipe)


def shortcut_loss(
    net: WanDiT, clean: Tensor, texts: Tensor, drafts: Tensor, generator: torch.Generator
) -> Tensor:
    """Flow matching for most clips of a batch, long steps for the others."""
    count, device = len(clean), clean.device
    noise = torch.randn(clean.shape, generator=generator).to(device)
    sigma = noise_levels(count, SHIFT, generator)
    sigma = sigma[torch.randperm(count, generator=generator)].to(device)
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
    t, target = 1000 * sigma, noise - clean
    far = torch.rand(count, generator=generator).to(device) < JUMPS
    length = torch.rand(count, generator=generator).to(device)  # of a jump, in parts of the way
    dt = SMALLEST + far * length * (t - SMALLEST).clamp_min(0)
    if far.any():
        target[far] = jump_targets(net, noisy[far], t[far], dt[far], texts[far], drafts[far])
    return F.mse_loss(velocities(net, noisy, t, texts, dt, drafts), target)
