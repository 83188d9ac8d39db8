# SPDX-License-Identifier: Apache-2.0
"""Three ways to decode a frame in tiles. What a tile carries along is kept here, until it is used.

Every tile of every latent frame is computed once, in one of two orders: frame by frame, or tile by
tile over the whole clip. The results are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pw_runtime.execution.protocols import BandDecoder, Decoder, StripDecoder
from pw_runtime.models.causal_cache import Allocate, CausalCache, Seam
from pw_runtime.models.tiling import (
    Rect,
    Strip,
    band_lag,
    band_rects,
    blend_ramp,
    exact_halo,
    make_bands,
    make_strips,
)
from pw_runtime.types import VAE_STRIDE, TilingConfig

BLOCK_STRIDE = VAE_STRIDE[2] // 2  # columns of 2x2 pixel blocks in one latent column
COARSE_STRIDE = 2  # columns that the coarse part makes of one

# Colours of a tile's pixel blocks, [12, F, rows / 2, columns / 2], and, where strips were blended,
# the sum of their weights by pixel column, [columns], by which the colours are yet to be divided
Colours = tuple[Tensor, Tensor | None]


class Tiles(Protocol):
    """A division of frames into tiles.

    Attributes:
        rects: the pixels of each tile, in the order in which they must be computed.
        past: what is carried from one latent frame to the next, by the part that it is of.
    """

    rects: tuple[Rect, ...]
    past: dict[str, CausalCache]

    def skip(self, frames: int) -> None:
        """Begin after so many latent frames, whose past the caller puts into `past`."""
        ...

    def shared(self, frame: Tensor) -> Tensor:
        """Compute what all tiles of a latent frame share, [C, 1, H, W] -> [..., H', W'].

        Frames come in order.
        """
        ...

    def tile(self, index: int, t: int, x: Tensor) -> Colours:
        """Compute one tile of latent frame t, after the same tile of the frames before it.

        Args:
            index: of the tile, after those before it of the same frame.
            t: of the latent frame.
            x: what its tiles share, on the device or on the host.
        """
        ...

    def replayed_from(self, index: int) -> int:
        """Return the first tile to compute again where only those from `index` on are missing."""
        ...


class Neighbours(Protocol):
    """The ranks that compute the tiles before and after a run of tiles of each frame."""

    def take(self) -> tuple[int, Tensor]:
        """Wait for the next tensor that the tile before the run hands on, and its number."""
        ...

    def give(self, number: int, x: Tensor) -> None:
        """Hand on a tensor to the tile after the run; it is not changed any more."""
        ...


class DividedTiles(Tiles, Protocol):
    """A division into tiles of which several ranks compute a run each.

    Attributes:
        linked: a tile hands on tensors to the next one of its frame.
    """

    linked: bool

    def divide(self, own: range, neighbours: Neighbours) -> None:
        """Compute only a run of the tiles from now on; the neighbours compute the others."""
        ...


def make_tiles(
    vae: Decoder, tiling: TilingConfig, shape: Sequence[int], device: torch.device, kept: Allocate
) -> Bands | HaloStrips | BlendedStrips:
    """Divide the frames of a latent, [C, T, H, W].

    Args:
        vae: the decoder.
        tiling: tiles and how they are joined.
        shape: of the latent.
        device: of the decoder.
        kept: returns memory for what a tile hands on to the next one of the same frame.
    """
    _, frames, rows, columns = shape
    if tiling.tiling == "official":
        strips = make_strips(columns, tiling.strips, tiling.overlap)
        return BlendedStrips(vae, strips, rows, frames, tiling.overlap, device, kept)
    if vae.exact_tiling == "bands":
        bands = make_bands(rows, tiling.strips, vae.config)
        return Bands(vae, bands, columns, frames, device, kept)
    overlap = max(tiling.overlap, exact_halo(vae.config))
    return HaloStrips(vae, make_strips(columns, tiling.strips, overlap), rows, frames, device)


class Bands:
    """Bands of rows; each hands on the rows that the next one needs: nothing is computed twice."""

    def __init__(
        self,
        vae: BandDecoder,
        bands: tuple[slice, ...],
        columns: int,
        frames: int,
        device: torch.device,
        kept: Allocate,
    ) -> None:
        self.rects = band_rects(bands, columns, vae.config)
        self._vae, self._bands, self._last_frame = vae, bands, frames - 1
        self._device, self._kept = device, kept
        self.past: dict[str, CausalCache] = {}
        self._to_share = frames
        self._seams: dict[int, Seam] = {}  # by latent frame
        self._own = range(len(bands))
        self._neighbours: Neighbours | None = None
        self._owners = tuple(vae.modules())  # of rows in a seam, numbered alike on every rank
        self.linked = len(bands) > 1

    def divide(self, own: range, neighbours: Neighbours) -> None:
        """Compute a run of the bands; see `DividedTiles.divide`."""
        self._own, self._neighbours = own, neighbours

    def skip(self, frames: int) -> None:
        """Begin after so many latent frames; see `Tiles.skip`."""
        self._to_share -= frames

    def shared(self, frame: Tensor) -> Tensor:
        """Run the global part; see `Tiles.shared`."""
        x = self._vae.global_part(frame, self.past.setdefault("global", CausalCache()))
        self._to_share -= 1
        if not self._to_share:
            del self.past["global"]
        return x

    def tile(self, index: int, t: int, x: Tensor) -> Colours:
        """Run the local part on a band; see `Tiles.tile`."""
        cache, bands = self.past.setdefault(f"band {index}", CausalCache()), self._bands
        if len(bands) > 1:
            seam = self._seams.setdefault(t, Seam(allocate=self._kept))
            seam.top, seam.bottom = index == 0, index == len(bands) - 1
            seam.take = self._take if index == self._own.start and not seam.top else None
            seam.give = self._give if index == self._own.stop - 1 and not seam.bottom else None
            cache.seam = seam
        rows = x[..., bands[index], :].to(self._device, non_blocking=True)
        colours = self._vae.local_part(rows, cache)
        cache.seam = None
        if t == self._last_frame:
            del self.past[f"band {index}"]
        if index == self._own.stop - 1:
            self._seams.pop(t, None)
        return colours, None

    def _take(self) -> tuple[nn.Module, Tensor]:
        assert self._neighbours is not None, "the run begins below the top"
        number, rows = self._neighbours.take()
        return self._owners[number], rows

    def _give(self, owner: nn.Module, rows: Tensor) -> None:
        assert self._neighbours is not None, "the run ends above the bottom"
        self._neighbours.give(self._owners.index(owner), rows)

    def replayed_from(self, index: int) -> int:
        """Return the first band to compute again; see `Tiles.replayed_from`.

        What is wrong above it spreads by a row with every convolution, and what a band hands on
        lags behind by as much.
        """
        apart = 2 * band_lag(self._vae.config) + 2
        first = index
        while first > 0 and self._bands[index].start - self._bands[first].start < apart:
            first -= 1
        return first


class HaloStrips:
    """Strips of columns, computed with the halo that the convolutions reach into: for engines."""

    linked = False

    def __init__(
        self,
        vae: StripDecoder,
        strips: tuple[Strip, ...],
        rows: int,
        frames: int,
        device: torch.device,
    ) -> None:
        self.rects = tuple(_rect(rows, strip.start, strip.stop) for strip in strips)
        self._vae, self._strips, self._last_frame = vae, strips, frames - 1
        self._device = device
        self.past: dict[str, CausalCache] = {}
        self._to_share = frames

    def skip(self, frames: int) -> None:
        """Begin after so many latent frames; see `Tiles.skip`."""
        self._to_share -= frames

    def shared(self, frame: Tensor) -> Tensor:
        """Run the coarse part; see `Tiles.shared`."""
        x = self._vae.coarse(frame, self.past.setdefault("coarse", CausalCache()))
        self._to_share -= 1
        if not self._to_share:
            del self.past["coarse"]
        return x

    def tile(self, index: int, t: int, x: Tensor) -> Colours:
        """Run the fine part on a strip; see `Tiles.tile`."""
        strip = self._strips[index]
        cache = self.past.setdefault(f"strip {index}", CausalCache())
        columns = x[..., strip.first * COARSE_STRIDE : strip.last * COARSE_STRIDE]
        dense = columns.contiguous(memory_format=torch.channels_last_3d)  # crosses as it is
        part = self._vae.fine(dense.to(self._device), cache)
        if t == self._last_frame:
            del self.past[f"strip {index}"]
        skip = (strip.start - strip.first) * BLOCK_STRIDE
        return part[..., skip : skip + (strip.stop - strip.start) * BLOCK_STRIDE], None

    def replayed_from(self, index: int) -> int:
        """Return `index`: strips do not depend on each other."""
        return index

    def divide(self, own: range, neighbours: Neighbours) -> None:
        """Do nothing: strips do not depend on each other."""


class BlendedStrips:
    """Strips of columns, each decoded as a picture of its own, blended (decode.py of PixelWizard).

    A strip finishes the columns in which no later one has a part, and hands on the others.
    """

    def __init__(
        self,
        vae: Decoder,
        strips: tuple[Strip, ...],
        rows: int,
        frames: int,
        overlap: int,
        device: torch.device,
        kept: Allocate,
    ) -> None:
        width = strips[-1].last
        # Where two strips begin in one column, the first of them finishes nothing.
        ends = [*(strip.first for strip in strips[1:]), width]
        self._spans = [(strip.first, end) for strip, end in zip(strips, ends, strict=True)]
        self.rects = tuple(_rect(rows, *span) for span in self._spans)
        self._vae, self._strips, self._last_frame = vae, strips, frames - 1
        self._device, self._kept = device, kept
        # A pixel column and the one after it belong to one column of blocks.
        self._ramps = [blend_ramp(strip, width, overlap).view(-1, 2) for strip in strips]
        self._weight = torch.zeros(width * BLOCK_STRIDE, 2)
        for strip, ramp in zip(strips, self._ramps, strict=True):
            self._weight[strip.first * BLOCK_STRIDE : strip.last * BLOCK_STRIDE] += ramp
        self.past: dict[str, CausalCache] = {}
        self._begun: dict[int, Tensor] = {}  # by latent frame: sums of columns not yet finished

    def skip(self, frames: int) -> None:
        """Do nothing: strips share the latent alone."""

    def shared(self, frame: Tensor) -> Tensor:
        """Return the latent frame itself."""
        return frame

    def tile(self, index: int, t: int, x: Tensor) -> Colours:
        """Decode a strip and add it to those before it; see `Tiles.tile`."""
        strip, (first, end) = self._strips[index], self._spans[index]
        names = [f"{part} {index}" for part in ("coarse", "fine")]
        coarse, fine = (self.past.setdefault(name, CausalCache()) for name in names)
        columns = x[..., strip.first : strip.last].to(self._device)
        part = self._vae.fine(self._vae.coarse(columns, coarse), fine)
        if t == self._last_frame:
            for name in names:
                del self.past[name]
        begun = self._begun.pop(t, None)
        width = max(part.shape[-1], 0 if begun is None else begun.shape[-1])
        total = part.new_zeros(*part.shape[:-1], width)
        if begun is not None:
            total[..., : begun.shape[-1]] += begun.to(total.device)
        ramp = self._ramps[index].to(part.device)
        # Channels are (colour, column, row): [3, 2, 2, F, rows / 2, columns / 2].
        colours = part.clamp_(-1, 1).unflatten(0, (3, 2, 2)) * ramp.T[:, None, None, None]
        total[..., : part.shape[-1]] += colours.flatten(0, 2)
        done = (end - first) * BLOCK_STRIDE
        if done < width:
            left = total[..., done:]
            self._begun[t] = self._kept(left).copy_(left)
        weight = self._weight[first * BLOCK_STRIDE : end * BLOCK_STRIDE].flatten()
        return total[..., :done], weight.clamp_min(1e-6).to(part.device)

    def replayed_from(self, index: int) -> int:
        """Return the first strip that has a part in the columns from that of `index` on."""
        first = self._strips[index].first
        return next(i for i, strip in enumerate(self._strips) if i == index or strip.last > first)


def _rect(rows: int, start: int, stop: int) -> Rect:
    """Return the pixels of latent columns [start, stop)."""
    return Rect(0, rows * VAE_STRIDE[1], start * VAE_STRIDE[2], stop * VAE_STRIDE[2])
