# SPDX-License-Identifier: Apache-2.0
"""What the transformers learn from: latents of many scenes, kept on the disk, and captions."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pw_export.nano.captions import caption
from pw_export.nano.pca import CHANNELS, Pca, fit_pca
from pw_export.nano.scenes import Scene, draw_scene, render
from pw_runtime.system.atomic_files import atomic_file
from pw_runtime.types import OFFICIAL_NEGATIVE

CPU = torch.device("cpu")
FRAMES = 17
TEXT_LEN = 32  # tokens that the transformers take
DROPOUT = 0.1  # share of texts that are replaced by one that says nothing
NOTHING = ("", OFFICIAL_NEGATIVE)  # what guidance steers away from: it must mean nothing
DRAFT_SIZE = (128, 64)
HIGHRES_SIZES = ((256, 128), (512, 256))  # clips of nano and nano-hd
VAE_SIZES = ((128, 64), (512, 256), (768, 384))  # what the latent space is fitted to


def open_pca(folder: Path) -> Pca:
    """The latent space, fitted the first time to scenes that no transformer sees."""
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


def training_scenes(count: int) -> list[Scene]:
    """The first scenes that are not held out."""
    scenes: list[Scene] = []
    number = 0
    while len(scenes) < count:
        scene = draw_scene(number)
        if not scene.held_out:
            scenes.append(scene)
        number += 1
    return scenes


def open_latents(folder: Path, pca: Pca, size: tuple[int, int], scenes: list[Scene]) -> Tensor:
    """[N, 48, T, H, W] fp16 latents of scenes at a size, made the first time."""
    file = folder / f"latents-{size[0]}x{size[1]}-{len(scenes)}.pt"
    if not file.exists():
        shape = (len(scenes), CHANNELS, (FRAMES - 1) // 4 + 1, size[1] // 16, size[0] // 16)
        made = torch.empty(shape, dtype=torch.float16)
        for latent, scene in zip(made, scenes, strict=True):
            latent.copy_(pca.encode(render(scene, *size, FRAMES)))
        with atomic_file(file) as partial:
            torch.save(made, partial)
    return torch.load(file, weights_only=True)


def draw_texts(scenes: list[Scene], generator: torch.Generator) -> list[str]:
    """A caption for each scene, or sometimes a text that says nothing."""
    draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
    return [
        draw.choice(NOTHING) if draw.random() < DROPOUT else caption(scene, draw)
        for scene in scenes
    ]


def tokens(
    tokenizer: Tokenizer, texts: list[str], device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """Texts -> token ids [B, TEXT_LEN] and which of them are real, [B, TEXT_LEN]."""
    ids = torch.zeros(len(texts), TEXT_LEN, dtype=torch.int64)
    mask = torch.zeros(len(texts), TEXT_LEN)
    for row, encoding in enumerate(tokenizer.encode_batch(texts)):
        found = encoding.ids[:TEXT_LEN]
        ids[row, : len(found)] = torch.tensor(found)
        mask[row, : len(found)] = 1
    return ids.to(device), mask.to(device)


def noise_levels(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """[count] noise shares, evenly spread, then shifted as the sampler shifts its own."""
    even = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return shift * even / (1 + (shift - 1) * even)
