# SPDX-License-Identifier: Apache-2.0
"""Initial noise, drawn from the official seeds or read from a file."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pw_runtime.errors import BadRequest
from pw_runtime.system.input_files import UnreadableInput
from pw_runtime.system.tensor_file import TensorFile
from pw_runtime.types import VAE_STRIDE, StageConfig, StageName, VideoConfig

LATENT_CHANNELS = 48
MAX_SEED = 2**62  # the seeds of later prompts are larger and must fit into 63 bits


@dataclass(frozen=True, slots=True)
class Seeds:
    """Seeds of one clip."""

    draft: int
    highres: int


def resolve_base_seed(seed: int) -> int:
    """Replace a negative base seed by a random one, as the official command line does.

    Raises BadRequest for a seed that is too large for the generators.
    """
    if seed >= MAX_SEED:
        raise BadRequest(
            "the seed is too large",
            got=seed,
            wanted=f"less than {MAX_SEED}",
            do="pass a smaller --seed",
        )
    return seed if seed >= 0 else secrets.randbelow(2**31)


def seeds_for(base: int, position: int) -> Seeds:
    """Return the seeds of the prompt at a 1-based position, whatever its id (as officially)."""
    return Seeds(draft=base + 100 * position, highres=base + 100 * (position - 1) + 10_000)


def latent_shape(stage: StageConfig, video: VideoConfig) -> tuple[int, int, int, int]:
    """Return the shape (C, T, H, W) of a stage's latent."""
    frames = (video.frames - 1) // VAE_STRIDE[0] + 1
    height, width = stage.height // VAE_STRIDE[1], stage.width // VAE_STRIDE[2]
    return LATENT_CHANNELS, frames, height, width


def draw_noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Draw standard normal fp32 noise; a CPU and a GPU draw different numbers from one seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


def load_noise(
    path: Path, stages: dict[StageName, StageConfig], video: VideoConfig
) -> dict[StageName, Tensor]:
    """Read `draft_noise` and `highres_noise` from a safetensors file.

    Returns:
        [C, T, H, W] fp32 on the CPU for each of the stages.

    Raises BadRequest if the file cannot be read or lacks a tensor, or a tensor has another shape,
    another digest than the file's metadata says, or holds NaN or infinity.
    """
    shapes = {f"{name}_noise": latent_shape(stage, video) for name, stage in stages.items()}
    try:
        file = TensorFile(path)
        tensors = file.tensors(tuple(shapes))
        if altered := file.altered(tensors):
            raise UnreadableInput(f"another SHA-256 of {', '.join(altered)} than when it was made")
    except UnreadableInput as error:
        raise BadRequest(
            f"cannot read the noise file {path}",
            got=error,
            wanted=f"a safetensors file with {' and '.join(shapes)}",
            do="pass a file written by --save-latents",
        ) from error
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            raise BadRequest(
                f"{path} does not fit the preset",
                got=f"{name} {list(tensors[name].shape)}" if name in tensors else f"no {name}",
                wanted=f"{name} {list(shape)} (channels, latent frames, rows, columns)",
                do="use the preset that the noise was drawn for, or omit --noise",
            )
        if not (tensors[name].is_floating_point() and tensors[name].isfinite().all()):
            raise BadRequest(
                f"{path} holds no usable noise",
                got=f"{name} of dtype {tensors[name].dtype}, or with NaN or infinity",
                wanted="finite floating-point numbers",
                do="pass a file written by --save-latents",
            )
    return {stage: tensors[f"{stage}_noise"].float() for stage in stages}


def tensor_digest(x: Tensor) -> str:
    """Return the SHA-256 of a tensor's fp32 values as hex digits."""
    return hashlib.sha256(x.float().cpu().contiguous().numpy().tobytes()).hexdigest()
