# SPDX-License-Identifier: Apache-2.0
"""What an end-to-end run is asked for, the same for every program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pw_bench.e2e.weights import Weights
from pw_runtime.job.preflight import default_precision
from pw_runtime.sampling.noise import draw_noise, latent_shape, seeds_for
from pw_runtime.system.atomic_files import write_tensors
from pw_runtime.types import OFFICIAL_NEGATIVE, Codec, Precision, Preset

SCOPE = "prompt in, closed mp4 on disk"
PROMPT = "a big red ball drifts to the right over a meadow, the camera pans"  # in known words


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One clip. All programs get the same weights, texts, noise, sizes and encoder settings.

    Attributes:
        checkpoint: folder in the official layout, with pixelwizard/highres.pt.
        bundle: the same, converted.
        prompt: text.
        negative: text.
        preset: sizes and sampler settings; without a high-res stage the draft is the clip.
        noise: safetensors file with draft_noise and highres_noise, [C, T, H, W] fp32.
        in_memory: random weights of the published sizes take the place of both.
        device: torch's name of it.
        precision: of the transformers.
        codec: of the video.
    """

    checkpoint: Path
    bundle: Path
    prompt: str
    negative: str
    preset: Preset
    noise: Path
    device: str
    precision: Precision
    codec: Codec
    in_memory: bool = False


class Program(Protocol):
    """Something that makes clips: a new one is a cold start, a second clip of it is a warm one.

    It says what it does by `pw_runtime.system.trace.span`, with the names load, text, draft,
    condition, highres, decode, encode and "step N" inside a denoising stage, and shows the latent
    after every step by `observe("latent", x)`, x being [C, T, H, W].
    """

    def clip(self, job: Job, video: Path) -> None:
        """From files to a closed video file. What it keeps loaded for the next clip is its way."""
        ...


def make_job(
    weights: Weights,
    preset: Preset,
    folder: Path,
    device: torch.device,
    precision: Precision | None,
) -> Job:
    """The job of a benchmark, its noise written to `folder`."""
    return Job(
        checkpoint=weights.checkpoint,
        bundle=weights.bundle,
        prompt=PROMPT,
        negative=OFFICIAL_NEGATIVE,
        preset=preset,
        noise=_write_noise(preset, folder / "noise.safetensors"),
        device=str(device),
        precision=default_precision(precision, device),
        codec="h264",
        in_memory=weights.in_memory,
    )


def _write_noise(preset: Preset, path: Path) -> Path:
    """The noise that `pw generate --seed 0` draws for the first prompt, in a file for all."""
    seeds = seeds_for(0, 1)
    noise = {
        f"{stage}_noise": draw_noise(
            latent_shape(plan, preset.video), getattr(seeds, stage), torch.device("cpu")
        )
        for stage, plan in preset.stages().items()
    }
    write_tensors(path, noise)
    return path


def scope_of(job: Job, weights: Weights) -> dict[str, str]:
    """What is measured. Results compare where this is equal."""
    scope = {"words": SCOPE}
    for stage, plan in job.preset.stages().items():
        scope[stage] = (
            f"{plan.width}x{plan.height}, {plan.steps} steps of {plan.solver}, "
            f"shift {plan.shift}, guidance {plan.guidance}"
        )
    video = job.preset.video
    return scope | {
        "video": f"{video.frames} frames at {video.fps} per second, {job.codec}",
        "decode": f"{job.preset.decode.strips} strips in the official recipe",
        "weights": weights.name,
        "precision": job.precision,
        "device": job.device,
        "files": "none: random weights, which each process makes in memory"
        if job.in_memory
        else "in the page cache",
    }
