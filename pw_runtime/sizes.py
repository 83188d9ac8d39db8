# SPDX-License-Identifier: Apache-2.0
"""Sizes of clips: which there can be, the best for a picture, and a preset of another size."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Final

from pw_runtime.errors import BadRequest
from pw_runtime.types import PATCH, VAE_STRIDE, Preset

PIXELS_PER_TOKEN: Final = VAE_STRIDE[1] * PATCH  # both sides of a size are multiples of it
MAX_POSITIONS: Final = 1024  # of the official rotary tables, along each axis
LONGEST: Final = PIXELS_PER_TOKEN * MAX_POSITIONS  # pixels of a side
MOST_FRAMES: Final = (MAX_POSITIONS - 1) * VAE_STRIDE[0] + 1
DRAFT_AREA: Final = 0.25  # by which a draft may be larger or smaller than the preset's own

Size = tuple[int, int]  # width and height in pixels


def best_size(width: int, height: int, area: int) -> Size:
    """Return the size of at most `area` pixels that suits a picture, by the official rule.

    The rule of image-to-video in Wan2.2: scale the picture to the area, cut one side to a multiple
    of 32, give the other what is left of the area, cut too; of the two ways, keep the one whose
    ratio is nearer to the picture's. The rounding is the official one as well.

    Args:
        width: of the picture, in pixels.
        height: of the picture.
        area: pixels of the size at most.

    Raises BadRequest for a picture so long that one side of its size would be less than 32 pixels.
    """
    ratio = width / height
    ideal_width = (area * ratio) ** 0.5
    ideal_height = area / ideal_width
    if (shortest := min(ideal_width, ideal_height)) < PIXELS_PER_TOKEN:
        raise BadRequest(
            f"a picture of {width}x{height} is too long for a clip of {area} pixels",
            got=f"a shorter side of {shortest:.0f} pixels",
            wanted=f"at least {PIXELS_PER_TOKEN}",
            do="cut the picture, or name a size: --size WxH",
        )
    by_width = _cut(ideal_width), _cut(area / _cut(ideal_width))
    by_height = _cut(area / _cut(ideal_height)), _cut(ideal_height)
    if _distortion(by_width, ratio) < _distortion(by_height, ratio):
        return by_width
    return by_height


def _cut(pixels: float) -> int:
    return int(pixels // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN)


def _distortion(size: Size, ratio: float) -> float:
    """Return by which factor a size is wider or higher than a ratio says; 1 is not at all."""
    own = size[0] / size[1]
    return max(ratio / own, own / ratio)


def sized(preset: Preset, size: Size) -> Preset:
    """Return a preset whose clip has this size, with a draft of the same shape.

    The draft is stretched onto the clip, so its ratio must be the clip's as nearly as can be: of
    all sizes whose area is within a quarter of the preset's own draft it has the one of the nearest
    ratio, and of equally near ones the one of the nearest area. A preset without a high-res stage
    has the draft as its clip. Decoding takes no more strips than there are latent columns.

    Raises BadRequest for a size that no clip can have, with those nearest to it.
    """
    require_size(size)
    width, height = size
    draft, highres = preset.draft, preset.highres
    if highres is None:
        draft = replace(draft, width=width, height=height)
    elif (highres.width, highres.height) != size:
        highres = replace(highres, width=width, height=height)
        draft_width, draft_height = _draft_size(size, draft.width * draft.height)
        draft = replace(draft, width=draft_width, height=draft_height)
    columns = width // VAE_STRIDE[2]
    decode = replace(
        preset.decode,
        strips=min(preset.decode.strips, columns),
        overlap=min(preset.decode.overlap, columns),
    )
    return replace(preset, draft=draft, highres=highres, decode=decode)


def _draft_size(clip: Size, area: int) -> Size:
    """Return the size of the draft of a clip, of about `area` pixels."""
    ratio, tokens = clip[0] / clip[1], area / PIXELS_PER_TOKEN**2
    least, most = tokens * (1 - DRAFT_AREA), tokens * (1 + DRAFT_AREA)
    grids = [
        (columns, rows)
        for columns in range(1, min(int(most), MAX_POSITIONS) + 1)
        for rows in range(1, min(int(most / columns), MAX_POSITIONS) + 1)
        if columns * rows >= least
    ]
    columns, rows = min(
        grids or [(1, 1)],
        key=lambda grid: (_distortion(grid, ratio), abs(log(grid[0] * grid[1] / tokens))),
    )
    return columns * PIXELS_PER_TOKEN, rows * PIXELS_PER_TOKEN


def require_size(size: Size) -> None:
    """Raise BadRequest for a size that no clip can have, with those nearest to it."""
    if all(_valid(pixels) for pixels in size):
        return
    nearest = [_neighbours(pixels, PIXELS_PER_TOKEN, 0, LONGEST) for pixels in size]
    proposed = "x".join(str(_nearer(x, near)) for x, near in zip(size, nearest, strict=True))
    raise BadRequest(
        f"no clip can have the size {size[0]}x{size[1]}",
        wanted=f"a width of {_either(nearest[0])} and a height of {_either(nearest[1])}: multiples "
        f"of {PIXELS_PER_TOKEN}, from {PIXELS_PER_TOKEN} to {LONGEST}",
        do=f"give for instance --size {proposed}",
    )


def with_frames(preset: Preset, frames: int) -> Preset:
    """Return a preset of another length. Raises BadRequest for one that no clip can have."""
    if not 0 < frames <= MOST_FRAMES or frames % VAE_STRIDE[0] != 1:
        nearest = _neighbours(frames, VAE_STRIDE[0], 1, MOST_FRAMES)
        raise BadRequest(
            f"no clip can have {frames} frames",
            wanted=f"{_either(nearest)}: 4n+1 frames, from 1 to {MOST_FRAMES}",
            do=f"give for instance --frames {_nearer(frames, nearest)}",
        )
    return replace(preset, video=replace(preset.video, frames=frames))


def _valid(pixels: int) -> bool:
    return 0 < pixels <= LONGEST and pixels % PIXELS_PER_TOKEN == 0


def _neighbours(value: int, step: int, offset: int, most: int) -> list[int]:
    """Return the values n * step + offset, above 0 and at most `most`, on both sides of a value."""
    least = offset or step
    below = (value - offset) // step * step + offset
    found = (below, below if below == value else below + step)
    return sorted({min(max(x, least), most) for x in found})


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))


def _nearer(value: int, neighbours: list[int]) -> int:
    """Return the nearer of some values, the larger of two equally near ones."""
    return min(neighbours, key=lambda x: (abs(x - value), -x))
