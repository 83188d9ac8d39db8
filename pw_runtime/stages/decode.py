# SPDX-License-Identifier: Apache-2.0
"""Latent -> frames, one latent frame at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pw_kernels import pack_frames, pack_yuv
from pw_runtime.models import VaeDecoder
from pw_runtime.models.vae_blocks import CausalCache
from pw_runtime.tiling import Strip, blend_ramp, exact_halo, make_strips
from pw_runtime.types import (
    VAE_STRIDE,
    Compat,
    DecodePlan,
    FrameChunk,
    Latent,
    PixelFormat,
)

BLOCK_STRIDE = VAE_STRIDE[2] // 2  # columns of 2x2 pixel blocks in one latent column


def decode(
    latent: Latent,
    plan: DecodePlan,
    compat: Compat,
    vae: VaeDecoder,
    pixel_format: PixelFormat = "rgb24",
) -> Iterator[FrameChunk]:
    """Decode a clip, yielding its frames as they appear: one first, then four at a time.

    Only the decoder's own memory of the past and one chunk of frames are held.

    Args:
        latent: [C, T, H, W] on the decoder's device.
        plan: strips and how they are joined.
        compat: official quirks.
        vae: the decoder.
        pixel_format: what the frames are packed as, on the decoder's device.

    Yields:
        Chunks in order, of 1 or 4 frames of 16 H x 16 W pixels.

    Raises:
        ValueError: truncated bytes, which only RGB has, as another format.
    """
    if compat.truncating_uint8 and pixel_format != "rgb24":
        raise ValueError(f"truncating_uint8 is for frames as rgb24, got {pixel_format}")
    width = latent.x.shape[3]
    cut = _exact if plan.tiling == "exact" else _official
    overlap = plan.overlap
    if plan.tiling == "exact":
        overlap = max(overlap, exact_halo(vae.config))
    decode_frame = cut(vae, make_strips(width, plan.strips, overlap), width, overlap)
    start = 0
    for frame in latent.x.split(1, dim=1):  # [C, 1, H, W]
        with torch.inference_mode():
            blocks, weight = decode_frame(frame)
            if pixel_format == "rgb24":
                packed = pack_frames(blocks, weight, truncate=compat.truncating_uint8).cpu()
            else:
                packed = pack_yuv(blocks, pixel_format, weight).cpu()
        del blocks
        frames = len(packed)
        yield FrameChunk(start=start, pixel_format=pixel_format, frames=packed)
        del packed  # while the next chunk is made, this one must be free
        start += frames


# [C, 1, H, W] -> colours of pixel blocks [12, F, 8 H, 8 W] and, where strips were blended, the sum
# of their weights by pixel column, [16 W], that the colours are still to be divided by
DecodeFrame = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def _exact(vae: VaeDecoder, strips: tuple[Strip, ...], width: int, overlap: int) -> DecodeFrame:
    """Coarse part whole, fine part in strips that see as far as the convolutions reach."""
    coarse_cache = CausalCache()
    caches = [CausalCache() for _ in strips]
    grow = 2  # columns that the coarse part makes of one latent column

    def decode_frame(frame: Tensor) -> tuple[Tensor, None]:
        x = vae.coarse(frame, coarse_cache)
        parts = []
        for strip, cache in zip(strips, caches, strict=True):
            part = vae.fine(x[..., strip.first * grow : strip.last * grow], cache)
            skip = (strip.start - strip.first) * BLOCK_STRIDE
            parts.append(part[..., skip : skip + (strip.stop - strip.start) * BLOCK_STRIDE])
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)), None

    return decode_frame


def _official(vae: VaeDecoder, strips: tuple[Strip, ...], width: int, overlap: int) -> DecodeFrame:
    """Every strip decoded as a picture of its own, then blended (decode.py of PixelWizard)."""
    caches = [(CausalCache(), CausalCache()) for _ in strips]
    ramps = [blend_ramp(strip, width, overlap) for strip in strips]

    def decode_frame(frame: Tensor) -> tuple[Tensor, Tensor]:
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
        return total, weight.clamp_min(1e-6)

    return decode_frame
