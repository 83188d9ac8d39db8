# SPDX-License-Identifier: Apache-2.0
"""Latent -> frames: one latent frame after the other, or one tile after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from pw_kernels import pack_frames, pack_yuv
from pw_runtime.errors import BadResult
from pw_runtime.execution.protocols import Decoder
from pw_runtime.models.causal_cache import Allocate
from pw_runtime.models.finite import is_finite, overflow
from pw_runtime.models.tiling import Rect
from pw_runtime.stages.decode_past import FrameLog, Past, caches_of, past_of
from pw_runtime.stages.decode_ranks import follow, lead
from pw_runtime.stages.decode_tiles import Bands, BlendedStrips, HaloStrips, Tiles, make_tiles
from pw_runtime.system.pinned_memory import PinnedMemory
from pw_runtime.system.ranks import Ranks
from pw_runtime.system.trace import span
from pw_runtime.types import (
    VAE_STRIDE,
    Compat,
    FrameChunk,
    Latent,
    PixelFormat,
    TilingConfig,
)

Advance = Callable[[float], object]


class TileStore(Protocol):
    """Finished tiles of a clip, which wait until the last one is finished.

    Attributes:
        finished: how many tiles are complete.
    """

    finished: int

    def open(self, shapes: Sequence[tuple[int, ...]], frames: int) -> None:
        """Begin, or go on, with tiles whose pixels have these shapes in each of the frames."""
        ...

    def write(self, pixels: Tensor) -> None:
        """Append the packed pixels of the next frames of the first tile that is not complete."""
        ...

    def finish(self) -> None:
        """Complete that tile: it is on the disk when this returns."""
        ...

    def read(self, tile: int, start: int, count: int) -> Tensor:
        """Return the packed pixels of some frames of a complete tile. Raises WriteFailed."""
        ...


def decode_frames(
    vae: Decoder,
    latent: Latent,
    tiling: TilingConfig,
    compat: Compat,
    pixel_format: PixelFormat = "rgb24",
    *,
    store: TileStore | None = None,
    log: FrameLog | None = None,
    advance: Advance = lambda frames: None,
    skip: Advance | None = None,
    ranks: Ranks | None = None,
) -> Generator[FrameChunk, None, None]:
    """Decode a clip, yielding its frames in order: one first, then four at a time.

    Args:
        vae: the decoder.
        latent: [C, T, H, W] on the decoder's device.
        tiling: tiles, how they are joined, and in which order they are computed.
        compat: official quirks.
        pixel_format: what the frames are packed as, on the decoder's device.
        store: of finished tiles, for the order `tiles`. Those that are complete in it are not
            computed again.
        log: of finished frames, for the order `frames` on one rank. Those that it has kept are not
            computed again; None keeps none.
        advance: called with the number of frames that were made, or the share of them in a tile.
        skip: called instead for tiles and frames that were complete; None: `advance` is.
        ranks: this one is rank 0 and decodes with the others, which call `decode_share`: the same
            frames, bit for bit. They hear nothing before the first chunk is asked for; after that,
            close this generator where it is not used up, so that they return.

    Yields:
        Chunks in order, of 1 or 4 frames of 16 H x 16 W pixels.

    Raises:
        BadWeights, BadResult: the decoder gives NaN or infinity.
        RuntimeError, RankFailed: another rank failed, or died.
        ValueError: truncated bytes in a format other than RGB; the order `tiles` without a store;
            several ranks for it or for official strips.
    """
    device, in_turn = latent.x.device, tiling.order == "tiles"
    kept: Allocate = torch.empty_like
    if in_turn and device.type == "cuda":
        kept = PinnedMemory().like
    tiles = make_tiles(vae, tiling, latent.x.shape, device, kept)
    truncating = _truncating(compat, pixel_format)
    clip = _Clip(vae, latent, tiles, pixel_format, truncating, advance, skip or advance)
    if ranks is not None and ranks.size > 1:
        with closing(lead(clip, _divisible(tiles, tiling), ranks)) as frames:
            yield from clip.collected(frames)
    elif not in_turn:
        yield from clip.frame_by_frame(log)
    elif store is None:
        raise ValueError("decoding tile by tile takes a store for the finished tiles")
    else:
        yield from clip.tile_by_tile(store, kept)


def decode_share(
    vae: Decoder,
    latent: Latent,
    tiling: TilingConfig,
    compat: Compat,
    pixel_format: PixelFormat = "rgb24",
    *,
    ranks: Ranks,
) -> None:
    """Decode this rank's tiles of a clip for rank 0, which calls `decode_frames`.

    Returns when they are done, or rank 0 has stopped; it has told why.

    Args:
        vae: the decoder.
        latent: the whole latent, [C, T, H, W] on the decoder's device.
        tiling: tiles, as on rank 0.
        compat: official quirks, as on rank 0.
        pixel_format: of the frames, as on rank 0.
        ranks: this one is not rank 0.

    Raises:
        RankFailed: another rank died.
        ValueError: as from `decode_frames`; rank 0 decodes something else.
    """
    tiles = make_tiles(vae, tiling, latent.x.shape, latent.x.device, torch.empty_like)
    truncating = _truncating(compat, pixel_format)
    clip = _Clip(vae, latent, tiles, pixel_format, truncating, _untold, _untold)
    follow(clip, _divisible(tiles, tiling), ranks)


def _truncating(compat: Compat, pixel_format: PixelFormat) -> bool:
    """Tell whether bytes are truncated. Raises ValueError where that is not defined."""
    if compat.truncating_uint8 and pixel_format != "rgb24":
        raise ValueError(f"truncating_uint8 is for frames as rgb24, got {pixel_format}")
    return compat.truncating_uint8


def _divisible(
    tiles: Bands | HaloStrips | BlendedStrips, tiling: TilingConfig
) -> Bands | HaloStrips:
    """Return tiles that ranks can divide. Raises ValueError."""
    if isinstance(tiles, BlendedStrips):
        raise ValueError("official strips are decoded by one rank, got several")
    if tiling.order == "tiles":
        raise ValueError("decoding tile by tile takes one rank, got several")
    return tiles


class _Clip:
    """One clip's decode."""

    def __init__(
        self,
        vae: Decoder,
        latent: Latent,
        tiles: Tiles,
        pixel_format: PixelFormat,
        truncate: bool,
        advance: Advance,
        skip: Advance,
    ) -> None:
        self._vae, self._latent, self._tiles = vae, latent, tiles
        self._format, self._truncate = pixel_format, truncate
        self._advance, self._skip = advance, skip
        self._height, self._width = (VAE_STRIDE[1] * n for n in latent.x.shape[2:])
        self.frames = latent.x.shape[1]  # latent ones

    def frame_by_frame(self, log: FrameLog | None) -> Iterator[FrameChunk]:
        """Compute all tiles of a latent frame, then those of the next. One chunk is held."""
        kept = None if log is None else log.begin()
        if kept is not None:
            yield from self._go_on(*kept)
        first = 0 if kept is None else len(kept[0])
        del kept
        for t in range(first, self.frames):
            start, frame = _frames_of(t)[0], self._latent.x[:, t : t + 1]  # [C, 1, H, W]
            picture = torch.empty(0)
            with torch.inference_mode(), span("chunk" if start else "first chunk"):
                shared = self._tiles.shared(frame)
                for index, rect in enumerate(self._tiles.rects):
                    pixels = self._pixels(*self._tiles.tile(index, t, shared))
                    if index == 0:
                        picture = self._picture(len(pixels))
                    self._place(pixels, picture, rect)
                    self._advance(self._share(len(pixels), rect))
                del shared, pixels
            if log is not None and t < self.frames - 1:
                log.keep(picture, past_of(self._tiles.past, self._layers))
            yield FrameChunk(start=start, pixel_format=self._format, frames=picture)
            del picture  # while the next chunk is made, this one must be free

    def _go_on(self, pictures: list[Tensor], past: Past) -> Iterator[FrameChunk]:
        """Yield finished frames, after which the tiles go on."""
        device = self._latent.x.device
        on_device = {name: x.to(device) for name, x in past.items()}
        self._tiles.past.update(caches_of(on_device, self._layers))
        self._tiles.skip(len(pictures))
        self._skip(sum(map(len, pictures)))
        for t, picture in enumerate(pictures):
            yield FrameChunk(start=_frames_of(t)[0], pixel_format=self._format, frames=picture)

    def collected(self, frames: Iterator[list[Tensor]]) -> Iterator[FrameChunk]:
        """Put together frames of which other ranks have computed some tiles."""
        for t in range(self.frames):
            chunk = self._put_together(t, next(frames))
            self._advance(len(chunk.frames))
            yield chunk
            del chunk

    @property
    def _layers(self) -> tuple[nn.Module, ...]:
        return tuple(self._vae.modules())

    def compute(self, t: int, own: range) -> list[Tensor]:
        """Compute some tiles of latent frame t; see `DividedClip.compute`."""
        shared = self._tiles.shared(self._latent.x[:, t : t + 1])
        return [self._pixels(*self._tiles.tile(index, t, shared)) for index in own]

    def shapes(self, t: int) -> list[tuple[int, ...]]:
        """Return the shape of each tile's packed pixels in latent frame t."""
        count = _frames_of(t)[1]
        return [(count, *self._shape(rect.height, rect.width)) for rect in self._tiles.rects]

    def not_finite(self) -> BadResult:
        """Return the error for NaN in frames. Raises BadWeights where it is in the weights."""
        self._vae.check_weights()
        return overflow("a decoded frame")

    def tile_by_tile(self, store: TileStore, kept: Allocate) -> Iterator[FrameChunk]:
        """Compute a tile of all latent frames, then the next; with the last one, frames appear.

        What all tiles of a frame share is computed for all frames first, and kept.
        """
        frames = VAE_STRIDE[0] * (self._latent.x.shape[1] - 1) + 1
        store.open([self._shape(rect.height, rect.width) for rect in self._tiles.rects], frames)
        last, finished = len(self._tiles.rects) - 1, store.finished
        for rect in self._tiles.rects[:finished]:
            self._skip(self._share(frames, rect))
        if finished > last:
            for t in range(self._latent.x.shape[1]):
                yield self._from_store(store, t, None)
            return
        with torch.inference_mode(), span("shared part"):
            shared = [self._keep(frame, kept) for frame in self._latent.x.split(1, dim=1)]
        for index in range(self._tiles.replayed_from(finished), last + 1):
            for t, x in enumerate(shared):
                with torch.inference_mode(), span("tile"):
                    colours = self._tiles.tile(index, t, x)
                    pixels = self._pixels(*colours) if index >= finished else None
                    del colours  # while the next ones are made, these must be free
                    if pixels is None:  # only what the tile hands on was missing
                        continue
                    store.write(pixels)
                    self._advance(self._share(len(pixels), self._tiles.rects[index]))
                if index == last:
                    yield self._from_store(store, t, pixels)
                del pixels
            if index >= finished:
                store.finish()

    def _keep(self, frame: Tensor, kept: Allocate) -> Tensor:
        """Compute what the tiles of a latent frame share, into memory that is kept.

        It is there when this returns: the CPU cuts strips from it.
        """
        x = self._tiles.shared(frame)
        return x if x is frame or x.device.type == "cpu" else kept(x).copy_(x)

    def _from_store(self, store: TileStore, t: int, newest: Tensor | None) -> FrameChunk:
        """Read the tiles of latent frame t; the last one may be at hand."""
        stored = len(self._tiles.rects) - (newest is not None)
        parts = (store.read(index, *_frames_of(t)) for index in range(stored))
        return self._put_together(t, parts if newest is None else chain(parts, (newest,)))

    def _put_together(self, t: int, parts: Iterable[Tensor]) -> FrameChunk:
        """Put together the frames made of latent frame t from the pixels of its tiles."""
        start, count = _frames_of(t)
        picture = self._picture(count)
        for pixels, rect in zip(parts, self._tiles.rects, strict=True):
            self._place(pixels, picture, rect)
        return FrameChunk(start=start, pixel_format=self._format, frames=picture)

    def _pixels(self, blocks: Tensor, weight: Tensor | None) -> Tensor:
        """Pack the colours of a tile, on the CPU. Raises BadWeights, BadResult for NaN."""
        if not is_finite(blocks):
            raise self.not_finite()
        if blocks.shape[-1] == 0:  # a strip that finishes no column
            shape = self._shape(2 * blocks.shape[2], 0)
            return torch.empty((blocks.shape[1], *shape), dtype=torch.uint8)
        with span("pack"):
            if self._format == "rgb24":
                return pack_frames(blocks, weight, truncate=self._truncate).cpu()
            return pack_yuv(blocks, self._format, weight).cpu()

    def _picture(self, count: int) -> Tensor:
        """Return frames laid out as in `FrameChunk`, with nothing in them."""
        return torch.empty((count, *self._shape(self._height, self._width)), dtype=torch.uint8)

    def _shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of the packed pixels of one frame, or of a tile of it."""
        return (rows, columns, 3) if self._format == "rgb24" else (rows * 3 // 2, columns)

    def _place(self, pixels: Tensor, picture: Tensor, rect: Rect) -> None:
        """Copy the packed pixels of a tile to their place in whole frames."""
        if self._format == "rgb24":
            picture[:, rect.top : rect.bottom, rect.left : rect.right] = pixels
            return
        whole, part = _planes(picture), _planes(pixels)
        for target, source, size in zip(whole, part, (1, 2, 2), strict=True):
            rows = slice(rect.top // size, rect.bottom // size)
            target[:, rows, rect.left // size : rect.right // size] = source

    def _share(self, frames: int, rect: Rect) -> float:
        """Return how many whole frames a tile of some frames makes up."""
        return frames * rect.height * rect.width / (self._height * self._width)


def _untold(frames: float) -> None:
    """Tell nobody about frames: rank 0 counts them."""


def _frames_of(t: int) -> tuple[int, int]:
    """Return the first of the frames made of latent frame t, and how many they are."""
    return (0, 1) if t == 0 else (VAE_STRIDE[0] * t - 3, VAE_STRIDE[0])


def _planes(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the planes Y, U and V of yuv420p frames, [F, 3/2 rows, columns], as views.

    U and V follow Y, each with half the rows and columns, two of their lines in one.
    """
    count, lines, width = frames.shape
    rows = lines * 2 // 3
    colour = frames[:, rows:].view(count, 2, rows // 2, width // 2)
    return frames[:, :rows], colour[:, 0], colour[:, 1]
