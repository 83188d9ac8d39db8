# SPDX-License-Identifier: Apache-2.0
"""How far one program's clip is from another's: latents step by step, and frames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final

import av
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pw_bench.clips.seams import seam_index
from pw_bench.results import Equivalence, Label, StepDifference
from pw_runtime.errors import BadResult
from pw_runtime.models.tiling import make_strips
from pw_runtime.types import VAE_STRIDE, Precision, Preset

# Up to here the last latent differs by rounding, in relative L2. Our transformer differs from
# diffusers' by 1e-6 and official bf16 from fp32 by 5e-3 after one pass; guidance multiplies the
# difference in each of the steps, and a wrong time, text or adapter moves it beyond 1e-1.
ROUNDING: Final[Mapping[Precision, float]] = {"fp32": 1e-3, "bf16": 5e-2}
# And up to here the frames: truncated instead of rounded bytes alone make 51 dB.
PSNR: Final = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a program left of a clip: latents after every step in order, and a lossless video."""

    side: str
    latents: Path
    video: Path


def compare_outputs(
    one: Output, other: Output, preset: Preset, precision: Precision
) -> Equivalence:
    """Compare a program's clip with that of another. Raises BadResult where they are not alike."""
    steps = step_differences(load_file(one.latents), load_file(other.latents), preset)
    frames = compare_frames(one.video, other.video, tile_borders(preset))
    limit = ROUNDING[precision]
    exact = frames.psnr is None and all(step.max_abs == 0 for step in steps)
    near = steps[-1].relative_l2 <= limit and (frames.psnr is None or frames.psnr >= PSNR)
    label: Label = "bit-exact" if exact else "rounding" if near else "approximate"
    return Equivalence(
        side=one.side,
        against=other.side,
        label=label,
        limit=limit,
        steps=steps,
        psnr=frames.psnr,
        ssim=frames.ssim,
        seam_index=frames.seam_index,
        flicker_ratio=frames.flicker_ratio,
    )


def step_differences(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], preset: Preset
) -> tuple[StepDifference, ...]:
    """Compare latents in the order of their names, one for each step of the preset's stages.

    Raises BadResult where there are not as many as the preset has steps, or of other shapes.
    """
    names = [
        (stage, step + 1) for stage, plan in preset.stages().items() for step in range(plan.steps)
    ]
    if not len(got) == len(wanted) == len(names):
        raise BadResult(
            "the programs did not take the same steps",
            got=f"{len(got)} and {len(wanted)} latents",
            wanted=f"{len(names)}",
        )
    found = []
    for key, (stage, step) in zip(sorted(got), names, strict=True):
        x, y = got[key].double(), wanted[key].double()
        if x.shape != y.shape:
            raise BadResult(f"{key}: shapes differ", got=tuple(x.shape), wanted=tuple(y.shape))
        if not (x.isfinite().all() and y.isfinite().all()):
            raise BadResult(f"{key} is not finite", got="NaN or infinity")
        found.append(
            StepDifference(
                stage=stage,
                step=step,
                cosine=torch.cosine_similarity(x.flatten(), y.flatten(), dim=0).item(),
                relative_l2=((x - y).norm() / y.norm()).item(),
                max_abs=(x - y).abs().max().item(),
            )
        )
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameDifference:
    """Two videos, frame by frame; fields as those of Equivalence."""

    psnr: float | None
    ssim: float
    seam_index: float | None
    flicker_ratio: float | None


def compare_frames(one: Path, other: Path, borders: Sequence[int] = ()) -> FrameDifference:
    """Read two videos side by side, two frames of each in memory.

    SSIM is that of Wang et al. 2004 (Gaussian window, by scikit-image), over colours and frames.

    Args:
        one: a video.
        other: of as many frames, of the same size.
        borders: first pixel column after each border of tiles, for the seam index of `one`.

    Raises BadResult where the videos are of different length or size.
    """
    from skimage.metrics import structural_similarity  # seconds to import

    squares: list[float] = []
    similarities: list[float] = []
    seams: list[float] = []
    changes: tuple[list[float], list[float]] = ([], [])
    before: tuple[np.ndarray, np.ndarray] | None = None
    for pair in _pairs(one, other):
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
        if before is not None:
            for change, now, then in zip(changes, (x, y), before, strict=True):
                change.append(float(np.abs(now - then).mean()))
        before = (x, y)
    error = float(np.mean(squares))
    mine, theirs = (sum(change) for change in changes)
    return FrameDifference(
        psnr=None if error == 0 else 10 * math.log10(255**2 / error),
        ssim=float(np.mean(similarities)),
        seam_index=float(np.mean(seams)) if seams and np.isfinite(seams).all() else None,
        flicker_ratio=mine / theirs if theirs else None,
    )


def _pairs(one: Path, other: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with av.open(str(one)) as first, av.open(str(other)) as second:
        pairs = zip_longest(first.decode(video=0), second.decode(video=0))
        for number, (x, y) in enumerate(pairs):
            if x is None or y is None:
                raise BadResult(f"{one} and {other} are not of the same length")
            if (x.width, x.height) != (y.width, y.height):
                raise BadResult(
                    f"frame {number} of {one} and {other} differ in size",
                    got=f"{x.width}x{x.height}",
                    wanted=f"{y.width}x{y.height}",
                )
            yield x.to_ndarray(format="rgb24"), y.to_ndarray(format="rgb24")


def tile_borders(preset: Preset) -> tuple[int, ...]:
    """First pixel column after each border of the strips that the official decode has."""
    stage, cut = list(preset.stages().values())[-1], preset.decode
    if cut.strips == 1:
        return ()
    strips = make_strips(stage.width // VAE_STRIDE[2], cut.strips, cut.overlap)
    return tuple(strip.start * VAE_STRIDE[2] for strip in strips[1:])
