# SPDX-License-Identifier: Apache-2.0
"""Latent -> frames, one latent frame at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pw_kernels import pack_frames, pack_yuv
from pw_runtime.execution.protocols import Decoder
from pw_runtime.models.causal_cache import CausalCache, Seam
from pw_runtime.models.finite import is_finite, overflow
from pw_runtime.models.tiling import Strip, blend_ramp, exact_halo, make_bands, make_strips
from pw_runtime.system.trace import span
from pw_runtime.types import (
    VAE_STRIDE,
    Compat,
    FrameChunk,
    Latent,
    PixelFormat,
    Place,
    TilingConfig,
)

BLOCK_STRIDE = VAE_STRIDE[2] // 2  # columns of 2x2 pixel blocks in one latent column
COARSE_STRIDE = 2  # rows, and columns, that the coarse part makes of one


def decode_frames(
    vae: Decoder,
    latent: Latent,
    tiling: TilingConfig,
    compat: Compat,
    pixel_format: PixelFormat = "rgb24",
) -> Iterator[FrameChunk]:
    """Decode a clip, yielding its frames as they appear: one first, then four at a time.

    Only the decoder's caches of past frames and one chunk of frames are held.

    Args:
        vae: the decoder.
        latent: [C, T, H, W] on the decoder's device.
        tiling: strips and how they are joined.
        compat: official quirks.
        pixel_format: what the frames are packed as, on the decoder's device.

    Yields:
        Chunks in order, of 1 or 4 frames of 16 H x 16 W pixels.

    Raises:
        BadWeights, BadResult: the decoder gives NaN or infinity.
        ValueError: truncated bytes in a format other than RGB.
    """
    if compat.truncating_uint8 and pixel_format != "rgb24":
        raise ValueError(f"truncating_uint8 is for frames as rgb24, got {pixel_format}")
    decode_frame = _tiled(vae, tiling, *latent.x.shape[2:])
    start = 0
    for frame in latent.x.split(1, dim=1):  # [C, 1, H, W]
        with torch.inference_mode(), span("chunk" if start else "first chunk"):
            parts = _finite(decode_frame(frame), vae)
            packed = _packed(parts, latent, pixel_format, truncate=compat.truncating_uint8)
        frames = len(packed)
        yield FrameChunk(start=start, pixel_format=pixel_format, frames=packed)
        del packed  # while the next chunk is made, this one must be free
        start += frames


# Colours of some rows of pixel blocks, [12, F, rows, 8 W], and, where strips were blended, the sum
# of their weights by pixel column, [16 W], by which the colours are yet to be divided
Rows = tuple[Tensor, Tensor | None]
# [C, 1, H, W] -> all rows of its frames, from the top
DecodeFrame = Callable[[Tensor], Iterator[Rows]]


def _tiled(vae: Decoder, tiling: TilingConfig, height: int, width: int) -> DecodeFrame:
    if tiling.tiling == "official":
        overlap = tiling.overlap
        return _official(vae, make_strips(width, tiling.strips, overlap), width, overlap)
    if vae.exact_tiling == "bands":
        return _exact(vae, make_bands(height, tiling.strips, vae.config), tiling.caches)
    overlap = max(tiling.overlap, exact_halo(vae.config))
    return _with_halo(vae, make_strips(width, tiling.strips, overlap))


def _finite(parts: Iterator[Rows], vae: Decoder) -> Iterator[Rows]:
    """Pass rows on. Raises BadWeights, BadResult for NaN or infinity in them."""
    for blocks, weight in parts:
        if not is_finite(blocks):
            vae.check_weights()
            raise overflow("a decoded frame")
        yield blocks, weight


def _packed(
    parts: Iterator[Rows], latent: Latent, pixel_format: PixelFormat, *, truncate: bool
) -> Tensor:
    """Pack rows as they arrive into one chunk's frames, laid out as in `FrameChunk`, on the CPU."""
    height, width = (16 * cells for cells in latent.x.shape[2:])
    frames, top = torch.empty(0), 0
    for blocks, weight in parts:
        count, bottom = blocks.shape[1], top + 2 * blocks.shape[2]
        if pixel_format == "rgb24":
            if top == 0:
                frames = torch.empty((count, height, width, 3), dtype=torch.uint8)
            with span("pack"):
                frames[:, top:bottom] = pack_frames(blocks, weight, truncate=truncate)
        else:
            if top == 0:
                frames = torch.empty((count, height * 3 // 2, width), dtype=torch.uint8)
            with span("pack"):
                packed = pack_yuv(blocks, pixel_format, weight)
                _place_planes(packed, frames, top)
        top = bottom
    return frames


def _place_planes(packed: Tensor, frames: Tensor, top: int) -> None:
    """Copy the planes of some rows, [F, 3/2 rows, width], into those of whole frames, from `top`.

    U and V follow Y, each with half the rows and columns, two of their lines in one.
    """
    (count, lines, width), height = packed.shape, frames.shape[1] * 2 // 3
    rows = lines * 2 // 3
    frames[:, top : top + rows] = packed[:, :rows]
    whole = frames[:, height:].view(count, 2, height // 2, width // 2)
    whole[:, :, top // 2 : (top + rows) // 2] = packed[:, rows:].view(count, 2, -1, width // 2)


def _exact(vae: Decoder, bands: tuple[slice, ...], caches: Place) -> DecodeFrame:
    """Decode the coarse part whole, the fine part in bands of rows, each passing on its seam."""
    coarse_cache, on_host = CausalCache(), caches == "host"
    memory = [CausalCache(on_host=on_host) for _ in bands]

    def decode_frame(frame: Tensor) -> Iterator[Rows]:
        x = vae.coarse(frame, coarse_cache)
        seam = Seam() if len(bands) > 1 else None
        for band, cache in zip(bands, memory, strict=True):
            cache.seam = seam
            if seam is not None:
                seam.bottom = band is bands[-1]
            part = x[..., band.start * COARSE_STRIDE : band.stop * COARSE_STRIDE, :]
            yield vae.fine(part, cache), None

    return decode_frame


def _with_halo(vae: Decoder, strips: tuple[Strip, ...]) -> DecodeFrame:
    """Decode the coarse part whole, the fine part in strips that include the convolutions' halo.

    For engines: a strip is computed from its own columns alone.
    """
    coarse_cache = CausalCache()
    caches = [CausalCache() for _ in strips]

    def decode_frame(frame: Tensor) -> Iterator[Rows]:
        x = vae.coarse(frame, coarse_cache)
        parts = []
        for strip, cache in zip(strips, caches, strict=True):
            part = vae.fine(x[..., strip.first * COARSE_STRIDE : strip.last * COARSE_STRIDE], cache)
            skip = (strip.start - strip.first) * BLOCK_STRIDE
            parts.append(part[..., skip : skip + (strip.stop - strip.start) * BLOCK_STRIDE])
        yield (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)), None

    return decode_frame


def _official(vae: Decoder, strips: tuple[Strip, ...], width: int, overlap: int) -> DecodeFrame:
    """Decode every strip as a picture of its own, then blend them (decode.py of PixelWizard)."""
    caches = [(CausalCache(), CausalCache()) for _ in strips]
    ramps = [blend_ramp(strip, width, overlap) for strip in strips]

    def decode_frame(frame: Tensor) -> Iterator[Rows]:
        total, weight = frame.new_zeros(()), frame.new_zeros(width * VAE_STRIDE[2])
        for strip, ramp, (coarse, fine) in zip(strips, ramps, caches, strict=True):
            part = vae.fine(vae.coarse(frame[..., strip.first : strip.last], coarse), fine)
            if total.dim() == 0:
                total = part.new_zeros(*part.shape[:-1], len(weight) // 2)
            # a pixel column and the one after it belong to one column of blocks; channels are
            # (colour, column, row)
            pairs = ramp.to(part.device).view(-1, 2)
            colours = part.clamp_(-1, 1).unflatten(0, (3, 2, 2))  # [3, 2, 2, F, 8 H, ...]
            columns = slice(strip.first * BLOCK_STRIDE, strip.last * BLOCK_STRIDE)
            total[..., columns] += (colours * pairs.T[:, None, None, None]).flatten(0, 2)
            weight.view(-1, 2)[columns] += pairs
        yield total, weight.clamp_min(1e-6)

    return decode_frame
