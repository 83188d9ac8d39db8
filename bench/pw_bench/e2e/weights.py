# SPDX-License-Identifier: Apache-2.0
"""The weights that a benchmark runs on, and the job that they are for.

They are a checkpoint's, the built-in model's, or synthetic ones. Apart from `job`, whose importers
are timed: converting weights needs most of pw_export.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from pw_bench.choices import SyntheticSize
from pw_bench.e2e.job import Job
from pw_bench.e2e.synthetic import IN_MEMORY
from pw_export.convert import convert
from pw_export.nano import (
    NANO_DIT,
    NANO_TEXT_ENCODER,
    NANO_VAE,
    write_nano_checkpoint,
)
from pw_export.nano.weights import write_trained_checkpoint
from pw_runtime.errors import BadRequest
from pw_runtime.job.checks import default_precision
from pw_runtime.sampling.noise import draw_noise, latent_shape, seeds_for
from pw_runtime.system.atomic_files import write_tensors
from pw_runtime.types import OFFICIAL_NEGATIVE, Precision, Preset

SCOPE: Final = "prompt in, closed mp4 on disk"
# In words that the built-in model knows.
PROMPT: Final = "a big red ball drifts to the right over a meadow, the camera pans"
BUILT_IN_PRESETS: Final = ("nano", "nano-hd")

# Between the built-in model and the published one, at the latter's proportions.
MEDIUM_DIT: Final = replace(
    NANO_DIT, dim=768, ffn_dim=3584, num_heads=6, num_layers=8, text_dim=512
)
MEDIUM_VAE: Final = replace(
    NANO_VAE,
    encoder_dims=tuple(2 * width for width in NANO_VAE.encoder_dims),
    decoder_dims=tuple(2 * width for width in NANO_VAE.decoder_dims),
)
MEDIUM_TEXT_ENCODER: Final = replace(
    NANO_TEXT_ENCODER, dim=512, attention_dim=512, ffn_dim=1024, num_heads=8, num_layers=4
)
HIGHRES_FILE: Final = Path("pixelwizard") / "highres.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A checkpoint in the official layout, and the same weights as a bundle."""

    name: str
    checkpoint: Path
    bundle: Path
    digest: str
    in_memory: SyntheticSize | None = None  # every process makes them, and there are no files


def pick_weights(
    preset: str,
    checkpoint: Path | None,
    synthetic: SyntheticSize | None,
    folder: Path,
    say: Callable[[str], None],
) -> Weights:
    """Return the weights of --checkpoint or --synthetic, else the built-in ones.

    Args:
        preset: name of the preset; the built-in model runs in its own presets only.
        checkpoint: folder in the official layout.
        synthetic: size of random weights.
        folder: for the files that are written.
        say: receives progress.

    Raises BadRequest, BadWeights.
    """
    if synthetic is None and checkpoint is None and preset in BUILT_IN_PRESETS:
        write_trained_checkpoint(folder / "checkpoint")
        return converted(folder / "checkpoint", folder, say, name="the built-in model, trained")
    if synthetic is not None and checkpoint is None:
        return synthetic_weights(synthetic, folder, say)
    if checkpoint is not None and synthetic is None:
        return converted(checkpoint, folder, say)
    twice = "--checkpoint and --synthetic both name the weights"
    raise BadRequest(
        f"--preset {preset} needs weights, and none are named" if checkpoint is None else twice,
        do="give --checkpoint FOLDER or --synthetic nano, medium, large or 5b",
    )


def synthetic_weights(size: SyntheticSize, folder: Path, say: Callable[[str], None]) -> Weights:
    """Write random weights of a size, from seed 0, and convert them; large ones have no files."""
    checkpoint = folder / "checkpoint"
    name = f"made-up weights, {size}, seed 0"
    if size in IN_MEMORY:
        return Weights(
            name=name, checkpoint=folder, bundle=folder, digest="none: no files", in_memory=size
        )
    if size == "nano":
        write_nano_checkpoint(checkpoint)
    else:
        write_nano_checkpoint(
            checkpoint,
            dit=MEDIUM_DIT,
            highres=replace(MEDIUM_DIT, has_dt=True, adapter_dim=192, control_blocks=(1,)),
            vae=MEDIUM_VAE,
            text_encoder=MEDIUM_TEXT_ENCODER,
        )
    return converted(checkpoint, folder, say, name=name)


def converted(
    checkpoint: Path, folder: Path, say: Callable[[str], None], name: str | None = None
) -> Weights:
    """Convert a checkpoint into a bundle under `folder`. Raises BadWeights, BadRequest."""
    highres = checkpoint / HIGHRES_FILE
    bundle = convert(
        wan=checkpoint,
        highres=highres if highres.exists() else None,
        out=folder / "bundle",
        say=say,
    )
    return Weights(
        name=name or checkpoint.name,
        checkpoint=checkpoint,
        bundle=bundle.root,
        digest=f"sha256:{bundle.digest}",
    )


def make_job(
    weights: Weights,
    preset: Preset,
    folder: Path,
    device: torch.device,
    precision: Precision | None,
) -> Job:
    """Return the job of a benchmark; its noise is written to `folder`."""
    return Job(
        checkpoint=weights.checkpoint,
        bundle=weights.bundle,
        prompt=PROMPT,
        negative=OFFICIAL_NEGATIVE,
        preset=preset,
        noise=write_noise(preset, folder / "noise.safetensors"),
        device=str(device),
        precision=default_precision(precision, device),
        codec="h264",
        in_memory=weights.in_memory,
    )


def write_noise(preset: Preset, path: Path) -> Path:
    """Write the noise that `pw generate --seed 0` draws for the first prompt; return the path."""
    seeds = seeds_for(0, 1)
    by_stage = {"draft": seeds.draft, "highres": seeds.highres}
    noise = {
        f"{stage}_noise": draw_noise(
            latent_shape(config, preset.video), by_stage[stage], torch.device("cpu")
        )
        for stage, config in preset.stages().items()
    }
    write_tensors(path, noise)
    return path


def scope_of(job: Job, weights: Weights) -> dict[str, str]:
    """Describe what is measured. Results are comparable where this is equal."""
    scope = {"words": SCOPE}
    for stage, config in job.preset.stages().items():
        scope[stage] = (
            f"{config.width}x{config.height}, {config.steps} steps of {config.solver}, "
            f"shift {config.shift}, guidance {config.guidance}"
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
