# SPDX-License-Identifier: Apache-2.0
"""Where the decode is cut, and how the official strips are blended: integers and ramps only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pw_runtime.types import VAE_STRIDE, VaeConfig


@dataclass(frozen=True, slots=True)
class Strip:
    """Columns of a latent: the strip owns [start, stop) and is computed from [first, last)."""

    start: int
    stop: int
    first: int
    last: int


def make_strips(width: int, strips: int, overlap: int) -> tuple[Strip, ...]:
    """Cut `width` latent columns as the official decode does.

    Every strip owns width // strips columns, the last one also the remainder, and sees
    `overlap` columns more on each inner side. Source: decode.py of PixelWizard.

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
    """Latent columns that the purely convolutional part of the decoder looks sideways.

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
    """Latent rows that each band of an exact decode is given, from the top.

    What a band makes lags behind what it is given, so the first one gets as many rows more: the
    results then have rows / bands rows each. Where fewer rows are left than that, the bands at
    the bottom are one.

    Args:
        rows: latent rows of the picture.
        bands: number of bands, at least 1.
        config: of the decoder.
    """
    lag = math.ceil(band_lag(config))
    ends = [min(rows, math.ceil(rows * band / bands) + lag) for band in range(1, bands)]
    borders = sorted({0, *ends, rows})
    return tuple(slice(start, stop) for start, stop in pairwise(borders))


def band_lag(config: VaeConfig) -> float:
    """Latent rows that the result of a band lags behind what the decoder's fine part was given.

    One row of its own grid for every 3x3 convolution, and for every upsampling one of the grid
    before it. 6.125 for the full-size decoder.
    """
    last = len(config.decoder_dims) - 2
    stages = sum((2 * config.decoder_blocks + 1) / 2**stage for stage in range(1, last))
    return stages + (2 * config.decoder_blocks + 1) / 2**last


def blend_ramp(strip: Strip, width: int, overlap: int) -> Tensor:
    """Weight of each pixel column of a strip in the official blend.

    1, but for a cosine ramp that starts at 0 over the outermost 16 * overlap pixel columns of
    each inner side; the result is sum(weight * strip) / sum(weight).

    Args:
        strip: from `make_strips`.
        width: latent columns of the whole picture.
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
