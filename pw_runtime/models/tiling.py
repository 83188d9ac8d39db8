# SPDX-License-Identifier: Apache-2.0
"""Geometry of a decode in tiles: where it is cut, and the ramps of the official blend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pw_runtime.types import VAE_STRIDE, VaeConfig


@dataclass(frozen=True, slots=True)
class Strip:
    """Latent columns of a tile: it owns [start, stop) and is computed from [first, last)."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Rect:
    """Pixels of a frame: rows [top, bottom), columns [left, right), even numbers all."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left


def make_strips(width: int, strips: int, overlap: int) -> tuple[Strip, ...]:
    """Cut `width` latent columns as the official decode does.

    Every strip owns width // strips columns, the last one also the remainder, and is computed with
    `overlap` more columns on each inner side. Source: decode.py of PixelWizard.

    Args:
        width: latent columns.
        strips: number of strips, 1 <= strips <= width.
        overlap: latent columns.
    """
    base = width // strips
    borders = [*(i * base for i in range(strips)), width]
    return tuple(
        Strip(start, stop, max(0, start - overlap), min(width, stop + overlap))
        for start, stop in pairwise(borders)
    )


def exact_halo(config: VaeConfig) -> int:
    """Return the latent columns that the decoder's purely convolutional part reaches sideways.

    Every 3-wide convolution reaches one column of its own grid; the grid doubles with each
    stage. 6 for the full-size decoder (5.75 rounded up).
    """
    reach = 0.0
    last = len(config.decoder_dims) - 2
    for stage in range(1, last + 1):
        reach += 2 * config.decoder_blocks / 2**stage  # two convolutions in each residual block
        if stage != last:
            reach += 1 / 2 ** (stage + 1)  # the convolution after the upsampling
    reach += 1 / 2**last  # the head
    return math.ceil(reach)


def make_bands(rows: int, bands: int, config: VaeConfig) -> tuple[slice, ...]:
    """Divide the latent rows into the input bands of an exact decode, top to bottom.

    The output of a band lags behind its input, so the first band gets that many rows more; every
    output then has rows / bands rows. The last band gives at least the lag and one row; where that
    is more, the others share what is left, and are fewer where rows run out.

    Args:
        rows: latent rows of the frame.
        bands: number of bands, at least 1.
        config: config of the decoder.
    """
    lag = math.ceil(band_lag(config))
    most = rows - lag - 1  # rows of output that the bands before the last one may have
    ends = [
        min(math.ceil(rows * band / bands), most * band // (bands - 1)) for band in range(1, bands)
    ]
    borders = sorted({0, *(end + lag for end in ends if end > 0), rows})
    return tuple(slice(start, stop) for start, stop in pairwise(borders))


def band_rects(bands: tuple[slice, ...], columns: int, config: VaeConfig) -> tuple[Rect, ...]:
    """Return the pixels that each band of `make_bands` gives, `columns` latent columns wide."""
    lag = int(band_lag(config) * VAE_STRIDE[1])
    ends = [band.stop * VAE_STRIDE[1] - lag for band in bands[:-1]]
    borders = [0, *ends, bands[-1].stop * VAE_STRIDE[1]]
    return tuple(Rect(*rows, 0, columns * VAE_STRIDE[2]) for rows in pairwise(borders))


def band_lag(config: VaeConfig) -> float:
    """Return the latent rows by which the output of the local part lags behind its input.

    Every 3x3 convolution adds one row of its own grid, every upsampling one row of the grid before
    it. 13.125 for the full-size decoder.
    """
    stages = len(config.decoder_dims) - 1
    return sum((2 * config.decoder_blocks + 1) / 2**stage for stage in range(stages))


def blend_ramp(strip: Strip, width: int, overlap: int) -> Tensor:
    """Return the weight of each pixel column of a strip in the official blend.

    The weight is 1 except for a cosine ramp from 0 over the outermost 16 * overlap pixel columns
    of each inner side; the blend is sum(weight * strip) / sum(weight).

    Args:
        strip: from `make_strips`.
        width: latent columns of the whole frame.
        overlap: latent columns.

    Returns:
        [16 (last - first)] fp32.
    """
    columns = (strip.last - strip.first) * VAE_STRIDE[2]
    length = min(overlap * VAE_STRIDE[2], columns)
    ramp = 0.5 - 0.5 * torch.cos(math.pi * torch.linspace(0, 1, length))
    weight = torch.ones(columns)
    if strip.start > 0:
        weight[:length] *= ramp
    if strip.stop < width:
        weight[columns - length :] *= ramp.flip(0)
    return weight
