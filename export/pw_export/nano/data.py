# SPDX-License-Identifier: Apache-2.0
"""Training data of the transformers: latents of many scenes, cached on disk, and captions."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pw_export.nano.captions import caption
from pw_export.nano.pca import CHANNELS, Pca, fit_pca
from pw_export.nano.scenes import SQUARE, TALL, WIDE, Scene, draw_scene, render
from pw_runtime.system.atomic_files import atomic_file
from pw_runtime.types import OFFICIAL_NEGATIVE

CPU = torch.device("cpu")
FRAMES = 17
TEXT_LEN = 32  # maximum tokens of a text
DROPOUT = 0.1  # share of texts that are replaced by an unconditional one
UNCONDITIONAL = ("", OFFICIAL_NEGATIVE)  # guidance steers away from these: they must mean nothing
Size = tuple[int, int]
DRAFT_SIZES: dict[float, Size] = {WIDE: (192, 96), SQUARE: (128, 128), TALL: (96, 192)}
HIGHRES_SIZES: dict[float, Size] = {WIDE: (256, 128), SQUARE: (192, 192), TALL: (128, 256)}
HD_SIZE = (512, 256)  # of preset nano-hd
VAE_SIZES = ((128, 64), (512, 256), (768, 384))  # sizes that the latent space is fitted to


def open_pca(folder: Path) -> Pca:
    """Load the latent space; the first time, fit it to scenes that no transformer sees."""
    file = folder / "pca.pt"
    if not file.exists():
        clips = zip((300, 30, 6), VAE_SIZES, strict=True)
        videos, number = [], -1
        for count, size in clips:
            for _ in range(count):
                videos.append(render(draw_scene(number), *size, FRAMES))
                number -= 1
        with atomic_file(file) as partial:
            torch.save(asdict(fit_pca(videos)), partial)
    return Pca(**torch.load(file, weights_only=True))


def training_scenes(count: int, aspect: float = WIDE) -> list[Scene]:
    """Return the first `count` varied scenes of an aspect that are not held out."""
    scenes: list[Scene] = []
    number = 0
    while len(scenes) < count:
        scene = draw_scene(number, varied=True, aspect=aspect)
        if not scene.held_out:
            scenes.append(scene)
        number += 1
    return scenes


def odds(scenes: list[Scene]) -> Tensor:
    """Weigh scenes by how hard they are, [N]: squares that are not big count twice.

    A small square differs from a circle by a few pixels at its corners, and is learned last. How
    often a caption is seen does not change what it means.
    """
    return torch.tensor([1.0 + (s.shape == "square" and s.size != "big") for s in scenes])


def draw_indices(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw [count] indices of scenes, with the weights of `odds`."""
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def open_latents(
    folder: Path, pca: Pca, size: Size, scenes: list[Scene], name: str = "latents"
) -> Tensor:
    """Load [N, 48, T, H, W] fp16 latents of scenes at a size; the first time, encode them."""
    file = folder / f"{name}-{size[0]}x{size[1]}-{len(scenes)}.pt"
    if not file.exists():
        shape = (len(scenes), CHANNELS, (FRAMES - 1) // 4 + 1, size[1] // 16, size[0] // 16)
        latents = torch.empty(shape, dtype=torch.float16)
        for latent, scene in zip(latents, scenes, strict=True):
            latent.copy_(pca.encode(render(scene, *size, FRAMES)))
        with atomic_file(file) as partial:
            torch.save(latents, partial)
    return torch.load(file, weights_only=True)


def draw_texts(scenes: list[Scene], generator: torch.Generator) -> list[str]:
    """Draw a caption for each scene, or sometimes an unconditional text."""
    draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
    return [
        draw.choice(UNCONDITIONAL) if draw.random() < DROPOUT else caption(scene, draw)
        for scene in scenes
    ]


def tokens(
    tokenizer: Tokenizer, texts: list[str], device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """Tokenize texts: token ids [B, TEXT_LEN], and a mask of the real ones, [B, TEXT_LEN]."""
    ids = torch.zeros(len(texts), TEXT_LEN, dtype=torch.int64)
    mask = torch.zeros(len(texts), TEXT_LEN)
    for row, encoding in enumerate(tokenizer.encode_batch(texts)):
        row_ids = encoding.ids[:TEXT_LEN]
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        mask[row, : len(row_ids)] = 1
    return ids.to(device), mask.to(device)


def noise_levels(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Draw [count] noise levels, evenly spread, then shifted as the sampler's are."""
    even = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return shift * even / (1 + (shift - 1) * even)
