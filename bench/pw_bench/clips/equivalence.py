# SPDX-License-Identifier: Apache-2.0
"""Difference between the clips of two programs: latents step by step, and frames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pw_bench.clips.seams import seam_index
from pw_bench.result_sections import Equivalence, Label, StepDifference
from pw_engines.engine import relative_l2
from pw_runtime.errors import BadResult
from pw_runtime.models.tiling import make_strips
from pw_runtime.system.video_input import video_frames
from pw_runtime.types import VAE_STRIDE, Precision, Preset

# Largest relative L2 of the last latent that counts as rounding. Our transformer differs from
# diffusers' by 1e-6 and official bf16 from fp32 by 5e-3 after one pass; guidance multiplies the
# difference in every step, and a wrong time, text or adapter moves it beyond 1e-1.
ROUNDING: Final[Mapping[Precision, float]] = {"fp32": 1e-3, "bf16": 5e-2}
# Smallest PSNR of the frames that counts as rounding. Truncating bytes alone makes 51 dB.
PSNR: Final = 40.0
SSIM_WINDOW: Final = 11  # pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Files of one program's clip: latents after every step, in order, and a lossless video."""

    program: str
    latents: Path
    video: Path


def compare_outputs(
    output: Output, reference: Output, preset: Preset, precision: Precision
) -> Equivalence:
    """Compare a program's clip with another's. Raises BadResult where they cannot be compared."""
    steps = step_differences(load_file(output.latents), load_file(reference.latents), preset)
    frames = compare_frames(output.video, reference.video, tile_borders(preset))
    limit = ROUNDING[precision]
    exact = frames.psnr is None and all(step.max_abs == 0 for step in steps)
    near = steps[-1].relative_l2 <= limit and (frames.psnr is None or frames.psnr >= PSNR)
    label: Label = "bit-exact" if exact else "rounding" if near else "approximate"
    return Equivalence(
        side=output.program,
        against=reference.program,
        label=label,
        limit=limit,
        steps=steps,
        psnr=frames.psnr,
        ssim=frames.ssim,
        seam_index=frames.seam_index,
        flicker_ratio=frames.flicker_ratio,
    )


def step_differences(
    latents: Mapping[str, Tensor], expected: Mapping[str, Tensor], preset: Preset
) -> tuple[StepDifference, ...]:
    """Compare latents in the order of their names, one for each step of the preset's stages.

    Raises BadResult where their number differs from the preset's steps, where shapes differ, and
    where a latent is not finite.
    """
    steps = [
        (stage, step + 1)
        for stage, config in preset.stages().items()
        for step in range(config.steps)
    ]
    if not len(latents) == len(expected) == len(steps):
        raise BadResult(
            "the programs did not take the same steps",
            got=f"{len(latents)} and {len(expected)} latents",
            wanted=f"{len(steps)}",
        )
    differences = []
    for key, (stage, step) in zip(sorted(latents), steps, strict=True):
        x, y = latents[key].double(), expected[key].double()
        if x.shape != y.shape:
            raise BadResult(f"{key}: shapes differ", got=tuple(x.shape), wanted=tuple(y.shape))
        if not (x.isfinite().all() and y.isfinite().all()):
            raise BadResult(f"{key} is not finite", got="NaN or infinity")
        differences.append(
            StepDifference(
                stage=stage,
                step=step,
                cosine=torch.cosine_similarity(x.flatten(), y.flatten(), dim=0).item(),
                relative_l2=relative_l2(x, y),
                max_abs=(x - y).abs().max().item(),
            )
        )
    return tuple(differences)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameDifference:
    """Difference between two videos, frame by frame; fields as in Equivalence."""

    psnr: float | None
    ssim: float
    seam_index: float | None
    flicker_ratio: float | None


def compare_frames(video: Path, reference: Path, borders: Sequence[int] = ()) -> FrameDifference:
    """Compare two videos, holding two frames of each in memory.

    SSIM is that of Wang et al. 2004 (Gaussian window, by scikit-image), over colours and frames.

    Args:
        video: a video.
        reference: one of as many frames of the same size.
        borders: first pixel column after each tile border, for the seam index of `video`.

    Raises BadResult where the videos differ in length or size, BadRequest where one is no video.
    """
    from skimage.metrics import structural_similarity  # seconds to import

    squares: list[float] = []
    similarities: list[float] = []
    seams: list[float] = []
    changes: tuple[list[float], list[float]] = ([], [])
    previous: tuple[np.ndarray, np.ndarray] | None = None
    for pair in _frame_pairs(video, reference):
        x, y = (frame.astype(np.float32) for frame in pair)
        squares.append(float(np.square(x - y, dtype=np.float64).mean()))
        similarities.append(
            structural_similarity(
                *pair,
                channel_axis=-1,
                data_range=255,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
        )
        if borders:
            seams.append(seam_index(torch.from_numpy(x).movedim(-1, 0), borders, -1))
        if previous is not None:
            for change, now, then in zip(changes, (x, y), previous, strict=True):
                change.append(float(np.abs(now - then).mean()))
        previous = (x, y)
    error = float(np.mean(squares))
    flicker, reference_flicker = (sum(change) for change in changes)
    return FrameDifference(
        psnr=None if error == 0 else 10 * math.log10(255**2 / error),
        ssim=float(np.mean(similarities)),
        seam_index=float(np.mean(seams)) if seams and np.isfinite(seams).all() else None,
        flicker_ratio=flicker / reference_flicker if reference_flicker else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelDifference:
    """Difference between two videos: PSNR in dB (None where no byte differs), and of 255."""

    psnr: float | None
    max_difference: int


def pixel_difference(video: Path, reference: Path) -> PixelDifference:
    """Compare two videos pixel by pixel, without what `compare_frames` needs to be installed.

    Raises BadResult where they differ in length or size, BadRequest where one is no video.
    """
    squares, largest = [], 0
    for x, y in _frame_pairs(video, reference):
        apart = np.abs(x.astype(np.int16) - y)
        squares.append(float(np.square(apart, dtype=np.float64).mean()))
        largest = max(largest, int(apart.max()))
    error = float(np.mean(squares))
    psnr = None if error == 0 else 10 * math.log10(255**2 / error)
    return PixelDifference(psnr=psnr, max_difference=largest)


def _frame_pairs(video: Path, reference: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    number = -1
    pairs = zip_longest(video_frames(video), video_frames(reference))
    for number, (x, y) in enumerate(pairs):
        if x is None or y is None:
            raise BadResult(
                f"{video} and {reference} differ in length",
                got=f"{number} frames in {video if x is None else reference}, more in the other",
                do="compare clips of as many frames",
            )
        if (x.width, x.height) != (y.width, y.height):
            raise BadResult(
                f"frame {number} of {video} and {reference} differ in size",
                got=f"{x.width}x{x.height}",
                wanted=f"{y.width}x{y.height}",
                do="compare clips of one size",
            )
        if min(x.width, x.height) < SSIM_WINDOW:
            raise BadResult(
                f"the pictures of {video} are too small to compare",
                got=f"{x.width}x{x.height}",
                wanted=f"{SSIM_WINDOW} pixels or more each way, the window of SSIM",
            )
        yield x.to_ndarray(format="rgb24"), y.to_ndarray(format="rgb24")
    if number < 0:
        raise BadResult(f"{video} and {reference} have no frames", do="make the clips again")


def tile_borders(preset: Preset) -> tuple[int, ...]:
    """Return the first pixel column after each border between strips of the official decode."""
    stage, tiling = list(preset.stages().values())[-1], preset.decode
    if tiling.strips == 1:
        return ()
    strips = make_strips(stage.width // VAE_STRIDE[2], tiling.strips, tiling.overlap)
    return tuple(strip.start * VAE_STRIDE[2] for strip in strips[1:])
