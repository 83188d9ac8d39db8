# SPDX-License-Identifier: Apache-2.0
"""What a clip shows, by plain measurement: the colour, shape and direction of what stands out.

The shapes are of strong colours and the landscapes are not, so that saturation finds the shape.
Nothing here is learned. Also PSNR, SSIM and sharpness of frames. All videos are [3, F, height,
width] in [-1, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pw_export.nano.scenes import COLOURS, SHAPES, Scene, outside

PALE, STRONG = 0.40, 0.52  # difference of the greatest and the least of R, G, B
SMALLEST = 0.004  # share of the picture that the shape must cover to be seen
STILL = 0.06  # way of the shape, in heights of the picture, that is not called a motion


@dataclass(frozen=True, slots=True)
class Seen:
    """Words of `scenes`; None where nothing could be made out."""

    colour: str | None
    shape: str | None
    motion: str | None

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Which of the three are as the caption says."""
        parts = ("colour", "shape", "motion")
        return {part: getattr(self, part) == getattr(scene, part) for part in parts}


def look_at(video: Tensor) -> Seen:
    """Measure a video."""
    rgb = (video.clamp(-1, 1) + 1) / 2
    saturation = rgb.amax(0) - rgb.amin(0)  # [F, height, width]
    mask = ((saturation - PALE) / (STRONG - PALE)).clamp(0, 1)
    area = mask.sum((1, 2))
    seen = area > SMALLEST * mask[0].numel()
    if seen.sum() < 2:
        return Seen(None, None, None)
    centres = torch.stack([_centre(frame) for frame in mask[seen]])  # [n, 2]
    return Seen(_colour(rgb, mask), _shape(mask[seen]), _motion(centres / mask.shape[1]))


def _centre(mask: Tensor) -> Tensor:
    """[2]: x and y of the middle of a mask, in pixels."""
    total = mask.sum()
    x = (mask.sum(0) * torch.arange(mask.shape[1])).sum() / total
    y = (mask.sum(1) * torch.arange(mask.shape[0])).sum() / total
    return torch.stack((x, y))


def _colour(rgb: Tensor, mask: Tensor) -> str:
    mean = (rgb * mask).flatten(1).sum(1) / mask.sum()
    distances = {
        name: abs(math.remainder(_hue(mean) - _hue(torch.tensor(colour)), 1.0))
        for name, colour in COLOURS.items()
    }
    return min(distances, key=distances.__getitem__)


def _hue(colour: Tensor) -> float:
    """Angle on the colour circle, in turns."""
    red, green, blue = colour.tolist()
    return math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)


def _shape(masks: Tensor) -> str:
    """The shape whose outline, at the same place and of the same area, fits best in all frames."""
    rows, columns = (torch.arange(n) for n in masks.shape[1:])
    fits = dict.fromkeys(SHAPES, 0.0)
    for mask in masks:
        x, y = _centre(mask)
        for shape, unit_area in AREAS.items():
            radius = math.sqrt(mask.sum().item() / unit_area)
            ideal = 0.5 - outside(shape, (columns - x)[None], (rows - y)[:, None], radius)
            ideal = ideal.clamp(0, 1)
            fits[shape] += (
                torch.minimum(mask, ideal).sum() / torch.maximum(mask, ideal).sum()
            ).item()
    return max(fits, key=fits.__getitem__)


AREAS = {"circle": math.pi, "square": 4 * 0.886**2, "triangle": 3 * math.sqrt(3) * 0.72**2}
"""Of the shapes of radius 1."""


def _motion(centres: Tensor) -> str | None:
    """[n, 2] centres, in heights of the picture -> the way from the first third to the last."""
    part = max(1, len(centres) // 3)
    dx, dy = (centres[-part:].mean(0) - centres[:part].mean(0)).tolist()
    if max(abs(dx), abs(dy)) < STILL:
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB."""
    return -10 * math.log10(max(((one - other) / 2).square().mean().item(), 1e-10))


def ssim(one: Tensor, other: Tensor) -> float:
    """Mean over frames of the SSIM of Wang et al. 2004 (Gaussian window, by scikit-image)."""
    from skimage.metrics import structural_similarity  # seconds to import

    frames = zip(one.transpose(0, 1).numpy(), other.transpose(0, 1).numpy(), strict=True)
    found = [
        structural_similarity(
            *pair,
            channel_axis=0,
            data_range=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for pair in frames
    ]
    return sum(found) / len(found)


def sharpness(video: Tensor) -> float:
    """Gradient energy: mean squared difference of neighbouring pixels."""
    return (video.diff(dim=2).square().mean() + video.diff(dim=3).square().mean()).item()
