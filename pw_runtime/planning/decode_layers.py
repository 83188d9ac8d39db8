# SPDX-License-Identifier: Apache-2.0
"""The decoder's layers in order, with the sizes of what they allocate and free, and their FLOP."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from pw_kernels.attention.chunked import SCORE_BYTES
from pw_kernels.causal_conv3d import LARGEST, slice_sizes
from pw_runtime.models.vae import PIXEL_CHANNELS
from pw_runtime.types import VaeConfig

HISTORY = 2  # past frames that a convolution over time sees
PAST = "past frames of the bands"
GLOBAL_PAST = "past frames of the global part"
SHARED = "results of the global part"
SEAMS = "rows between bands"


@dataclass(frozen=True, slots=True)
class Band:
    """Position of a band: at the top, at the bottom, or between."""

    top: bool
    bottom: bool

    def buffer(self, rows: int) -> int:
        """Return the rows that a 3x3 convolution reads."""
        return rows + (1 if self.top else 2) + self.bottom

    def after(self, rows: int) -> int:
        """Return the rows that it computes from them."""
        return self.buffer(rows) - 2


@dataclass(slots=True)
class PeakCounter:
    """Counts live bytes by name while the decoder's layers are visited, and keeps the peak.

    Methods take sizes: t frames, n rows and w columns of c channels.
    """

    config: VaeConfig
    itemsize: int
    live: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)  # the live bytes at the peak
    caches_grow: bool = True
    in_turn: bool = False  # tile by tile: rows between bands are of all frames
    handed_on: list[int] = field(default_factory=list)  # bytes of each tensor, of one chunk
    flop: int = 0  # of the convolutions

    def allocate(self, name: str, size: int) -> None:
        """Add bytes; negative ones are freed."""
        self.live[name] += size
        if self.live.total() > self.peak.total():
            self.peak = +self.live

    def count_weights(self) -> None:
        """Count all weights, and the taps made from those of the upsampling convolutions."""
        dims, z = self.config.decoder_dims, self.config.z_dim
        temporal = (*reversed(self.config.temporal_downsample), False)
        count = z * z + z + _conv(z, dims[0]) + 2 * _block(dims[0], dims[0])
        count += 4 * dims[0] ** 2 + 5 * dims[0]  # attention
        last = len(dims) - 2
        for stage, (c_in, c) in enumerate(pairwise(dims)):
            count += _block(c_in, c) + (self.config.decoder_blocks - 1) * _block(c, c)
            if stage != last:
                count += (9 + 16) * c * c + c + temporal[stage] * (6 * c * c + 2 * c)
        norms = dims[-1]
        count += norms + _conv(dims[-1], PIXEL_CHANNELS)
        self.allocate("weights", count * self.itemsize)

    def frame_by_frame(
        self, rows: int, columns: int, bands: list[int], owned: range, waiting: int = 0
    ) -> None:
        """Decode the owned bands of latent frames; the peak is that of one with a full past.

        `waiting` are the bytes of rows for other ranks, or from them, when a frame begins.
        """
        for grow in (True, False):
            self.caches_grow, self.peak = grow, Counter()
            self.live.pop(SHARED, None)
            self.live[SEAMS] = waiting
            self.global_part(rows, columns)
            self.allocate(SHARED, self.config.decoder_dims[0] * rows * columns * self.itemsize)
            for index in owned:
                self.local_part(bands, index, columns)

    def tile_by_tile(
        self, rows: int, columns: int, bands: list[int], waiting: dict[str, list[int]]
    ) -> None:
        """Decode bands one after the other, all frames of each.

        `waiting` is what waits for them in the same memory; empty where they are copied there.
        """
        self.in_turn = True
        self.allocate(SHARED, sum(waiting.get(SHARED, ())))
        for grow in (True, False):
            self.caches_grow = grow
            self.global_part(rows, columns)
        self.live.pop(GLOBAL_PAST)
        self.allocate(SEAMS, sum(waiting.get(SEAMS, ())))
        for index, given in enumerate(bands):
            copied = 0 if waiting else given * columns * self.config.decoder_dims[0]
            self.allocate("activations", copied * self.itemsize)
            for grow in (True, False):
                self.caches_grow = grow
                self.local_part(bands, index, columns)
            self.allocate("activations", -copied * self.itemsize)
            self.live.pop(PAST)

    def global_part(self, rows: int, columns: int) -> None:
        """Run what sees the whole of one latent frame."""
        dims, area = self.config.decoder_dims, rows * columns
        place, band = GLOBAL_PAST, None
        self.conv(self.config.z_dim, dims[0], 1, rows, columns, band, place)
        x = dims[0] * area * self.itemsize
        self.allocate("activations", x)
        self.block(dims[0], dims[0], 1, rows, columns, band, place)
        self.attention(dims[0], area)
        self.block(dims[0], dims[0], 1, rows, columns, band, place)
        self.allocate("activations", -x)

    def local_part(
        self, bands: list[int], index: int, columns: int, *, first: bool = False
    ) -> None:
        """Run the rest on one band, for the first latent frame or for a later one."""
        dims, place = self.config.decoder_dims, PAST
        temporal = (*reversed(self.config.temporal_downsample), False)
        last = len(dims) - 2
        band = Band(index == 0, index == len(bands) - 1) if len(bands) > 1 else None
        t, n, w, x = 1, bands[index], columns, 0
        for stage in range(last):
            doubled = temporal[stage] and not first
            n = self.stage(stage, t, n, w, band, place, doubled=doubled)
            t, w = t * (1 + doubled), 2 * w
            made = t * n * w * dims[stage + 1] * self.itemsize
            self.allocate("activations", made - x)
            x = made
        for block in range(self.config.decoder_blocks):
            n = self.block(dims[last + (block > 0)], dims[-1], t, n, w, band, place)
            made = t * n * w * dims[-1] * self.itemsize
            self.allocate("activations", made - x)
            x = made
        self.conv(dims[-1], PIXEL_CHANNELS, t, n, w, band, place)
        self.allocate("activations", -x)

    def stage(
        self, index: int, t: int, n: int, w: int, band: Band | None, place: str, *, doubled: bool
    ) -> int:
        """Run blocks and upsampling on `n` rows, which the caller counts; return the rows made."""
        config = self.config
        c_in, c = config.decoder_dims[index : index + 2]
        x = 0
        for block in range(config.decoder_blocks):
            n = self.block(c_in if block == 0 else c, c, t, n, w, band, place)
            made = t * n * w * c * self.itemsize
            self.allocate("activations", made - x)
            x = made
        frames = t
        if doubled:
            self.flop += 2 * 6 * c * c * t * n * w
            one = c * n * w * self.itemsize
            self.cache(place, HISTORY * one)
            self.transient((HISTORY + t + 2 * t) * one)
            self.transient(4 * t * one)
            frames = 2 * t
        more = c * n * w * frames * self.itemsize if doubled else 0
        self.allocate("activations", more)
        read = made_rows = n
        if band is not None:
            read, made_rows = n + (0 if band.top else 2), band.after(n)
            self.carry_rows(band, 2 * c * frames * w)
        self.flop += 2 * 16 * c * c * frames * made_rows * w
        joined = c * frames * w * read * self.itemsize if band and not band.top else 0
        part = c * frames * (read + 1) * (w + 1) * self.itemsize
        out = 4 * c * frames * made_rows * w * self.itemsize
        self.transient(joined + part + out)
        self.allocate("activations", -more - x)
        if band is not None:
            lag = 2 * config.decoder_blocks + 1
            self.allocate("activations", out)
            self.carry_rows(band, lag * c_in * t * w)
            self.allocate("activations", -out)
        return 2 * made_rows

    def block(
        self, c_in: int, c: int, t: int, n: int, w: int, band: Band | None, place: str
    ) -> int:
        """Run a residual block on `n` rows, which the caller counts; return the rows made."""
        middle = n if band is None else band.after(n)
        made = middle if band is None else band.after(middle)
        self.conv(c_in, c, t, n, w, band, place, keeps_rows=c_in != c)
        one = t * w * c * self.itemsize
        self.allocate("activations", one * middle)
        self.conv(c, c, t, middle, w, band, place, freed=one * middle)
        self.allocate("activations", one * made)
        if c_in != c:
            self.flop += 2 * c_in * c * t * n * w
            self.transient(one * n)
        if band is not None:
            self.carry_rows(band, 2 * c * t * w)
        self.allocate("activations", -one * made)
        return made

    def conv(
        self,
        c_in: int,
        c: int,
        t: int,
        n: int,
        w: int,
        band: Band | None,
        place: str,
        freed: int = 0,
        keeps_rows: bool = True,
    ) -> None:
        """Run a 3x3x3 convolution: its buffer, then its result; `freed` bytes go in between."""
        read, made = (n, n) if band is None else (band.buffer(n), band.after(n))
        self.flop += 2 * 27 * c_in * c * t * made * w
        kept = read if band is None or not band.bottom else read - 1
        self.cache(place, HISTORY * c_in * kept * w * self.itemsize)
        buffer = (HISTORY + t) * c_in * read * w * self.itemsize
        self.allocate("activations", buffer)
        self.allocate("activations", -freed)
        if band is not None and keeps_rows:
            self.carry_rows(band, 2 * t * c_in * w)
        self.transient((c * t * made + self.slice_rows(c_in, c, t, read, w)) * w * self.itemsize)
        self.allocate("activations", -buffer)

    def slice_rows(self, c_in: int, c: int, t: int, read: int, w: int) -> int:
        """Return the rows (all channels and frames) of a slice, where it runs in slices."""
        x, weight = (1, c_in, HISTORY + t, read, w), (c, c_in, 3, 3, 3)
        frames, rows = slice_sizes(x, weight, LARGEST)
        return 0 if (frames, rows) == (t, read) else c * frames * rows

    def attention(self, c: int, area: int) -> None:
        """Run attention over one frame: queries, keys, values, result, scores of some rows."""
        wide = 2 * c * area * 4 if self.itemsize < 4 else 0  # keys and values in fp32
        scores = min(SCORE_BYTES, area * area * 4)
        self.transient((1 + 3 + 1) * c * area * self.itemsize + wide + scores)

    def transient(self, size: int) -> None:
        """Allocate bytes and free them at once."""
        self.allocate("activations", size)
        self.allocate("activations", -size)

    def cache(self, place: str, size: int) -> None:
        """Keep past frames."""
        if self.caches_grow:
            self.allocate(place, size)

    def carry_rows(self, band: Band, elements: int) -> None:
        """Carry rows to the next band: the top band adds them, the bottom band frees them."""
        size = elements * self.itemsize
        self.transient(size)  # those from above, put together with those for below
        if band.top:
            self.handed_on.append(size)
        if not self.in_turn:
            self.allocate(SEAMS, (band.top - band.bottom) * size)


def _conv(c_in: int, c: int) -> int:
    return 27 * c_in * c + c


def _block(c_in: int, c: int) -> int:
    shortcut = c_in * c + c if c_in != c else 0
    return c_in + _conv(c_in, c) + c + _conv(c, c) + shortcut
