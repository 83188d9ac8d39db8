# SPDX-License-Identifier: Apache-2.0
"""Latent -> frames, one latent frame at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pw_kernels import pack_frames
from pw_runtime.models import VaeDecoder
from pw_runtime.models.vae_blocks import CausalCache
from pw_runtime.tiling import Strip, blend_ramp, exact_halo, make_strips
from pw_runtime.types import VAE_STRIDE, Compat, DecodePlan, FrameChunk, Latent


def decode(
    latent: Latent, plan: DecodePlan, compat: Compat, vae: VaeDecoder
) -> Iterator[FrameChunk]:
    """Decode a clip, yielding its frames as they appear: one first, then four at a time.

    Only the decoder's own memory of the past and one chunk of frames are held.

    Args:
        latent: [C, T, H, W] on the decoder's device.
        plan: strips and how they are joined.
        compat: official quirks.
        vae: the decoder.

    Yields:
        Chunks in order, [1 or 4, 16 H, 16 W, 3] uint8.
    """
    width = latent.x.shape[3]
    cut = _exact if plan.tiling == "exact" else _official
    overlap = plan.overlap
    if plan.tiling == "exact":
        overlap = max(overlap, exact_halo(vae.config))
    decode_frame = cut(vae, make_strips(width, plan.strips, overlap), width, overlap)
    start = 0
    for frame in latent.x.split(1, dim=1):  # [C, 1, H, W]
        with torch.inference_mode():
            video = decode_frame(frame)
            rgb = pack_frames(video, truncate=compat.truncating_uint8).cpu()
        del video
        frames = len(rgb)
        yield FrameChunk(start=start, rgb=rgb)
        del rgb  # while the next chunk is made, this one must be free
        start += frames


DecodeFrame = Callable[[Tensor], Tensor]  # [C, 1, H, W] -> [3, F, 16 H, 16 W], in [-1, 1]


def _exact(vae: VaeDecoder, strips: tuple[Strip, ...], width: int, overlap: int) -> DecodeFrame:
    """Coarse part whole, fine part in strips that see as far as the convolutions reach."""
    coarse_cache = CausalCache()
    caches = [CausalCache() for _ in strips]
    grow = 2  # columns that the coarse part makes of one latent column

    def decode_frame(frame: Tensor) -> Tensor:
        x = vae.coarse(frame, coarse_cache)
        parts = []
        for strip, cache in zip(strips, caches, strict=True):
            part = vae.fine(x[..., strip.first * grow : strip.last * grow], cache)
            skip = (strip.start - strip.first) * VAE_STRIDE[2]
            parts.append(part[..., skip : skip + (strip.stop - strip.start) * VAE_STRIDE[2]])
        return torch.cat(parts, dim=-1).clamp_(-1, 1)

    return decode_frame


def _official(vae: VaeDecoder, strips: tuple[Strip, ...], width: int, overlap: int) -> DecodeFrame:
    """Every strip decoded as a picture of its own, then blended (decode.py of PixelWizard)."""
    caches = [(CausalCache(), CausalCache()) for _ in strips]
    ramps = [blend_ramp(strip, width, overlap) for strip in strips]

    def decode_frame(frame: Tensor) -> Tensor:
        total, weight = frame.new_zeros(()), frame.new_zeros(width * VAE_STRIDE[2])
        for strip, ramp, (coarse, fine) in zip(strips, ramps, caches, strict=True):
            part = vae.fine(vae.coarse(frame[..., strip.first : strip.last], coarse), fine)
            if total.dim() == 0:
                total = part.new_zeros(*part.shape[:-1], len(weight))
            columns = slice(strip.first * VAE_STRIDE[2], strip.last * VAE_STRIDE[2])
            ramp = ramp.to(part.device)
            total[..., columns] += part.clamp_(-1, 1) * ramp
            weight[columns] += ramp
        return total / weight.clamp_min(1e-6)

    return decode_frame
