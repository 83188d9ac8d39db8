# SPDX-License-Identifier: Apache-2.0
"""Small valid files of every kind that is read from outside; tests then damage them."""

from __future__ import annotations

from pathlib import Path

import torch

from pw_runtime.job.latents import write_latents
from pw_runtime.job.provenance import Provenance
from pw_runtime.sampling.noise import latent_shape, seeds_for
from pw_runtime.types import Preset, Prompt, RunOptions, StageConfig, TilingConfig, VideoConfig

STAGE = StageConfig(width=64, height=32, steps=2, shift=5.0, guidance=3.0)
PRESET = Preset(draft=STAGE, video=VideoConfig(frames=5, fps=12))


def small_provenance(vae: str = "0" * 64) -> Provenance:
    """The origin of a draft of two latent frames."""
    seeds = seeds_for(7, 1)
    return Provenance(
        prompt=Prompt(id="0", text="a cat", position=1),
        negative="",
        preset=PRESET,
        decode=TilingConfig(),
        options=RunOptions(kernels="reference"),
        seeds={"base": 7, "draft": seeds.draft, "highres": seeds.highres},
        noise={"draft": "0" * 64},
        noise_file=None,
        bundle={"digest": "0" * 64},
        vae=vae,
        engines={},
        notices=(),
        seconds={"draft": 1.5},
        versions={"torch": "2"},
    )


def small_latents(path: Path) -> Path:
    """Write a latents file with three tensors."""
    generator = torch.Generator().manual_seed(0)
    shape = latent_shape(STAGE, PRESET.video)
    latent, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    context = torch.randn(3, 8, generator=generator).bfloat16()
    tensors = {"draft_latent": latent, "draft_noise": noise, "text_context": context}
    write_latents(path, small_provenance(), tensors)
    return path
