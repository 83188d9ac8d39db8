# SPDX-License-Identifier: Apache-2.0
"""Colour, shape and direction of the salient objects in a clip, by plain measurement.

The shapes have strong colours and the landscapes do not, so that saturation finds the shape.
Nothing here is learned. Also PSNR, SSIM and sharpness of frames. All videos are [3, F, height,
width] in [-1, 1].
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from pw_bench.result_sections import Attributes
from pw_export.nano.scenes import COLOURS, SHAPES, Scene, outside

ATTRIBUTES: Final = ("colour", "shape", "motion")
PALE, STRONG = 0.40, 0.52  # difference between the largest and the smallest of R, G, B
MIN_AREA = 0.004  # share of the frame that a visible shape covers
MIN_OBJECT = 0.008  # the same of an object of one colour: more than the mixed colours of an edge
MIN_MOTION = 0.06  # in frame heights; a smaller displacement is no motion


def classify(video: Tensor) -> Attributes:
    """Determine colour, shape and motion of a video."""
    rgb = (video.clamp(-1, 1) + 1) / 2
    mask = _salient(rgb)
    area = mask.sum((1, 2))
    visible = area > MIN_AREA * mask[0].numel()
    if visible.sum() < 2:
        return Attributes(None, None, None)
    centres = torch.stack([_centre(frame) for frame in mask[visible]])  # [n, 2]
    motion = _motion(centres / mask.shape[1])
    return Attributes(_colour(rgb, mask), _shape(mask[visible]), motion)


def classify_each(video: Tensor) -> dict[str, Attributes]:
    """Determine shape and motion of the object of each colour in a video, by colour."""
    rgb = (video.clamp(-1, 1) + 1) / 2
    salient, hues = _salient(rgb), _hues(rgb)
    own = torch.stack([_hues(torch.tensor(colour)) for colour in COLOURS.values()])
    turns = (hues[None] - own.view(-1, 1, 1, 1) + 0.5).remainder(1.0) - 0.5  # [6, F, h, w]
    nearest = turns.abs().argmin(0)
    found = {}
    for index, colour in enumerate(COLOURS):
        mask = salient * (nearest == index)
        visible = mask.sum((1, 2)) > MIN_OBJECT * mask[0].numel()
        if visible.sum() >= 2:
            centres = torch.stack([_centre(frame) for frame in mask[visible]])
            motion = _motion(centres / mask.shape[1])
            found[colour] = Attributes(colour, _shape(mask[visible]), motion)
    return found


def _salient(rgb: Tensor) -> Tensor:
    """Return how much each pixel of [3, F, height, width] belongs to an object, 0 to 1."""
    saturation = rgb.amax(0) - rgb.amin(0)  # [F, height, width]
    return ((saturation - PALE) / (STRONG - PALE)).clamp(0, 1)


def matches(attributes: Attributes, scene: Scene) -> dict[str, bool]:
    """Return which of the attributes are as the scene's caption says."""
    return {name: getattr(attributes, name) == getattr(scene, name) for name in ATTRIBUTES}


def _centre(mask: Tensor) -> Tensor:
    """Return [2]: x and y of the centre of a mask, in pixels."""
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
    """Return the angle on the colour circle, in turns."""
    return _hues(colour).item()


def _hues(rgb: Tensor) -> Tensor:
    """Return the angles of colours [3, ...] on the colour circle, in turns, [...]."""
    red, green, blue = rgb
    angles = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    return angles / (2 * math.pi)


def _shape(masks: Tensor) -> str:
    """Return the shape that, with the mask's centre and area, fits best over all frames."""
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
"""Areas of the shapes of radius 1."""


def _motion(centres: Tensor) -> str | None:
    """Return the direction from the first third to the last; centres [n, 2] in frame heights."""
    third = max(1, len(centres) // 3)
    dx, dy = (centres[-third:].mean(0) - centres[:third].mean(0)).tolist()
    if max(abs(dx), abs(dy)) < MIN_MOTION:
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def psnr(video: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB."""
    return -10 * math.log10(max(((video - reference) / 2).square().mean().item(), 1e-10))


def ssim(video: Tensor, reference: Tensor) -> float:
    """Return the mean SSIM of frames (Wang et al. 2004, Gaussian window, by scikit-image)."""
    from skimage.metrics import structural_similarity  # seconds to import

    frames = zip(video.transpose(0, 1).numpy(), reference.transpose(0, 1).numpy(), strict=True)
    similarities = [
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
    return sum(similarities) / len(similarities)


def sharpness(video: Tensor) -> float:
    """Return the gradient energy: the mean squared difference of neighbouring pixels."""
    return (video.diff(dim=2).square().mean() + video.diff(dim=3).square().mean()).item()
