# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the exact decode, in closed form: for sizes that nobody has run yet.

The decoder's layers are visited in order with the sizes of what they allocate and free. Tensors
are counted, not what an allocator or a library's workspace adds; for norms and attention, what the
kernels take. Tests compare it with `pw_bench.measure.tensor_ledger`, within 5 %.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from pw_kernels.attention.chunked import SCORE_BYTES
from pw_kernels.causal_conv3d import LARGEST, slice_sizes
from pw_runtime.models.tiling import make_bands
from pw_runtime.models.vae import PIXEL_CHANNELS
from pw_runtime.types import VAE_STRIDE, MemoryItem, MemoryKind, Place, VaeConfig

HISTORY = 2  # past frames that a convolution over time sees
FINE_CACHES = "fine caches"  # past frames of the part that runs in bands
_KINDS: dict[str, MemoryKind] = {
    "weights": "weights",
    "coarse caches": "caches",
    FINE_CACHES: "caches",
}


def decode_memory(
    config: VaeConfig,
    *,
    frames: int,
    rows: int,
    columns: int,
    strips: int = 1,
    itemsize: int = 4,
    caches: Place = "device",
) -> tuple[MemoryItem, ...]:
    """List what is in memory at the device's peak during the exact decode of a clip.

    Args:
        config: of the decoder.
        frames: of the latent; from the third on nothing grows any more, and no fewer are assumed.
        rows: of the latent.
        columns: of the latent.
        strips: bands of rows, as in `TilingConfig`.
        itemsize: bytes of a weight and of an activation, 4 or 2.
        caches: where the past of the fine part lies.

    Returns:
        The items; those at "device" add up to its peak. The frames of one chunk are at "host".
    """
    counter = _PeakCounter(config, itemsize)
    counter.allocate("latent", config.z_dim * frames * rows * columns * 4)
    bands = [band.stop - band.start for band in make_bands(rows, strips, config)]
    counter.count_weights()
    counter.chunk(rows, columns, bands)  # fills the caches
    if caches == "host":
        del counter.live[FINE_CACHES]
    counter.caches_grow = False
    counter.peak = Counter()
    counter.chunk(rows, columns, bands)
    pixels = VAE_STRIDE[0] * rows * columns * VAE_STRIDE[1] * VAE_STRIDE[2]
    host = {
        FINE_CACHES: counter.pinned if caches == "host" else 0,
        "packed frames": pixels * 3 // 2,
    }
    return (
        *(_item(name, size, "device") for name, size in counter.peak.items()),
        *(_item(name, size, "host") for name, size in host.items() if size),
    )


def _item(name: str, size: int, place: Place) -> MemoryItem:
    return MemoryItem(name=name, kind=_KINDS.get(name, "activations"), bytes=size, place=place)


@dataclass(frozen=True, slots=True)
class _Band:
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
class _PeakCounter:
    """Counts live bytes by name while the decoder's layers are visited, and keeps the peak.

    Methods take sizes: t frames, n rows and w columns of c channels.
    """

    config: VaeConfig
    itemsize: int
    live: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)  # the live bytes at the peak
    caches_grow: bool = True
    pinned: int = 0  # bytes of the fine part's caches in pinned memory

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

    def chunk(self, rows: int, columns: int, bands: list[int]) -> None:
        """Decode one latent frame."""
        self.coarse(rows, columns)
        self.fine(bands, 2 * columns)

    def coarse(self, rows: int, columns: int) -> None:
        """Run everything up to the first upsampling, for one latent frame; its result stays."""
        dims, area = self.config.decoder_dims, rows * columns
        place, band = "coarse caches", None
        self.live.pop("coarse result", None)
        self.conv(self.config.z_dim, dims[0], 1, rows, columns, band, place)
        x = dims[0] * area * self.itemsize
        self.allocate("activations", x)
        self.block(dims[0], dims[0], 1, rows, columns, band, place)
        self.attention(dims[0], area)
        self.block(dims[0], dims[0], 1, rows, columns, band, place)
        self.stage(0, 1, rows, columns, band, place)
        self.allocate("activations", -x)
        temporal = 2 if self.config.temporal_downsample[-1] else 1
        self.allocate("coarse result", 4 * temporal * dims[1] * area * self.itemsize)

    def fine(self, bands: list[int], columns: int) -> None:
        """Run the rest, band by band, for the frames that the coarse part made from one."""
        dims, place = self.config.decoder_dims, FINE_CACHES
        temporal = (*reversed(self.config.temporal_downsample), False)
        last = len(dims) - 2
        for index, given in enumerate(bands):
            band = _Band(index == 0, index == len(bands) - 1) if len(bands) > 1 else None
            t, n, w, x = 1 + temporal[0], 2 * given, columns, 0
            for stage in range(1, last):
                n = self.stage(stage, t, n, w, band, place)
                t, w = t * (1 + temporal[stage]), 2 * w
                self.allocate("activations", t * n * w * dims[stage + 1] * self.itemsize - x)
                x = t * n * w * dims[stage + 1] * self.itemsize
            for index_ in range(self.config.decoder_blocks):
                n = self.block(dims[last + (index_ > 0)], dims[-1], t, n, w, band, place)
                made = t * n * w * dims[-1] * self.itemsize
                self.allocate("activations", made - x)
                x = made
            self.conv(dims[-1], PIXEL_CHANNELS, t, n, w, band, place)
            self.allocate("activations", -x)
        self.live.pop("rows between bands", None)

    def stage(self, index: int, t: int, n: int, w: int, band: _Band | None, place: str) -> int:
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
        if (*reversed(config.temporal_downsample), False)[index]:
            one = c * n * w * self.itemsize
            self.cache(place, HISTORY * one)
            self.transient((HISTORY + t + 2 * t) * one)
            self.transient(4 * t * one)
            frames = 2 * t
        doubled = c * n * w * frames * self.itemsize if frames != t else 0
        self.allocate("activations", doubled)
        read = made_rows = n
        if band is not None:
            read, made_rows = n + (0 if band.top else 2), band.after(n)
            self.carry_rows(band, 2 * c * frames * w)
        joined = c * frames * w * read * self.itemsize if band and not band.top else 0
        part = c * frames * (read + 1) * (w + 1) * self.itemsize
        out = 4 * c * frames * made_rows * w * self.itemsize
        self.transient(joined + part + out)
        self.allocate("activations", -doubled - x)
        if band is not None:
            lag = 2 * config.decoder_blocks + 1
            self.allocate("activations", out)
            self.carry_rows(band, lag * c_in * t * w)
            self.allocate("activations", -out)
        return 2 * made_rows

    def block(
        self, c_in: int, c: int, t: int, n: int, w: int, band: _Band | None, place: str
    ) -> int:
        """Run a residual block on `n` rows, which the caller counts; return the rows made."""
        middle = n if band is None else band.after(n)
        made = middle if band is None else band.after(middle)
        self.conv(c_in, c, t, n, w, band, place)
        one = t * w * c * self.itemsize
        self.allocate("activations", one * middle)
        self.conv(c, c, t, middle, w, band, place, freed=one * middle)
        self.allocate("activations", one * made)
        if c_in != c:
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
        band: _Band | None,
        place: str,
        freed: int = 0,
    ) -> None:
        """Run a 3x3x3 convolution: its buffer, then its result; `freed` bytes go in between."""
        read, made = (n, n) if band is None else (band.buffer(n), band.after(n))
        self.cache(place, HISTORY * c_in * n * w * self.itemsize)
        buffer = (HISTORY + t) * c_in * read * w * self.itemsize
        self.allocate("activations", buffer)
        self.allocate("activations", -freed)
        if band is not None:
            self.carry_rows(band, 2 * (HISTORY + t) * c_in * w)
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
            if (
                place == FINE_CACHES
            ):  # each on its own; PyTorch rounds pinned blocks up to powers of two
                self.pinned += 1 << (size - 1).bit_length()

    def carry_rows(self, band: _Band, elements: int) -> None:
        """Carry rows to the next band: the top band adds them, the bottom band frees them."""
        sign = band.top - band.bottom
        self.allocate("rows between bands", sign * elements * self.itemsize)


def _conv(c_in: int, c: int) -> int:
    return 27 * c_in * c + c


def _block(c_in: int, c: int) -> int:
    shortcut = c_in * c + c if c_in != c else 0
    return c_in + _conv(c_in, c) + c + _conv(c, c) + shortcut
