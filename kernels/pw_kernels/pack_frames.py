# SPDX-License-Identifier: Apache-2.0
"""From decoder output to bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from pw_kernels.launcher import Kernel, cdiv, launch
from pw_kernels.op import Cost, Op, chosen, register, require

_KERNEL = Kernel("pack_frames")
BLOCK = 1024  # pixels a program packs


def unpatchify_pixels(x: Tensor) -> Tensor:
    """Spread 2x2 pixel blocks: channel (c*2 + column)*2 + row goes to (row, column).

    The column offset stands before the row offset, unlike the usual pixel shuffle.

    Args:
        x: [B, 4c, F, H, W].

    Returns:
        [B, c, F, 2H, 2W].
    """
    x = x.unflatten(1, (-1, 2, 2))  # [B, c, column, row, F, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def pack_frames(video: Tensor, *, truncate: bool) -> Tensor:
    """Turn [-1, 1] values into 8-bit RGB: clamp((v + 1) / 2 * 255, 0, 255), rounded half to even.

    Args:
        video: [3, F, height, width] fp32.
        truncate: cut the fraction off as the official code does, instead of rounding.

    Returns:
        [F, height, width, 3] uint8, contiguous.
    """
    if chosen("pack_frames", video.device).implementation == "triton":
        _check(video)
        out: Tensor = torch.ops.pw.pack_frames(video, truncate)
        return out
    return reference(video, truncate)


def reference(video: Tensor, truncate: bool) -> Tensor:
    """The oracle of `pack_frames`."""
    scaled = ((video + 1) / 2 * 255).clamp(0, 255)
    if not truncate:
        scaled = scaled.round()
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def cost(video: Tensor, truncate: bool) -> Cost:
    """One read of the values, one byte written for each; add, halve, scale, clamp twice, round."""
    flops = (5 if truncate else 6) * video.numel()
    return Cost(flops=flops, bytes=video.numel() * (video.element_size() + 1))


def _check(video: Tensor) -> None:
    name, shape = "pack_frames", tuple(video.shape)
    require(video.dim() == 4 and shape[0] == 3, name, "video [3, F, height, width]", shape)
    require(video.numel() > 0, name, "at least one pixel", shape)
    require(video.dtype == torch.float32, name, "fp32", video.dtype)
    require(video.is_contiguous(), name, "video contiguous", video.stride())


@torch.library.custom_op("pw::pack_frames", mutates_args=())
def _op(video: torch.Tensor, truncate: bool) -> torch.Tensor:
    return reference(video, truncate)


@_op.register_kernel("cuda")
def run_kernel(video: Tensor, truncate: bool) -> Tensor:
    """Launch the kernel; the input was checked by the caller."""
    out = torch.empty((*video.shape[1:], 3), dtype=torch.uint8, device=video.device)
    pixels = video[0].numel()
    launch(
        _KERNEL,
        (cdiv(pixels, BLOCK),),
        {"video_ptr": video, "out_ptr": out, "pixels": pixels},
        {"TRUNCATE": truncate, "BLOCK": BLOCK},
        num_warps=4,
    )
    return out


@_op.register_fake
def _fake(video: Tensor, truncate: bool) -> Tensor:
    return video.new_empty((*video.shape[1:], 3), dtype=torch.uint8)


OP = register(Op("pack_frames", reference, cost))
