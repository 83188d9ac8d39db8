# SPDX-License-Identifier: Apache-2.0
"""Turn decoder output into bytes: 8-bit RGB."""

from __future__ import annotations

import torch
from torch import Tensor

from pw_kernels.launcher import cdiv, launch
from pw_kernels.op import Cost, Op, register, require, select
from pw_kernels.variant import Kernel

_KERNEL = Kernel("pack_frames")
BLOCK = 1024  # pixels per program


def unpatchify_pixels(x: Tensor) -> Tensor:
    """Unfold 2x2 pixel blocks: channel (c*2 + column)*2 + row goes to (row, column).

    The column offset comes before the row offset, unlike in the usual pixel shuffle.

    Args:
        x: [B, 4c, F, H, W].

    Returns:
        [B, c, F, 2H, 2W].
    """
    x = x.unflatten(1, (-1, 2, 2))  # [B, c, column, row, F, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def pack_frames(blocks: Tensor, weight: Tensor | None = None, *, truncate: bool) -> Tensor:
    """Convert the decoder's values to 8-bit RGB: clamp((v + 1) / 2 * 255, 0, 255), half to even.

    Args:
        blocks: [12, F, H, W] fp32, colours in [-1, 1] of 2x2 pixel blocks as the decoder returns
            them (`unpatchify_pixels`); clamped here.
        weight: [2W] fp32 by which every pixel column is divided first: the summed weights of
            blended strips.
        truncate: drop the fraction as the official code does, instead of rounding.

    Returns:
        [F, 2H, 2W, 3] uint8, contiguous.

    Raises:
        ValueError: input that the kernel does not take, where the kernel was requested.
    """
    triton = select("pack_frames", blocks.device) == "triton"
    run = torch.ops.pw.pack_frames if triton else reference
    return run(blocks, weight, truncate)


def reference(blocks: Tensor, weight: Tensor | None, truncate: bool) -> Tensor:
    """Oracle of `pack_frames`."""
    scaled = ((pixels_of(blocks, weight) + 1) / 2 * 255).clamp_(0, 255)
    if not truncate:
        scaled.round_()
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def pixels_of(blocks: Tensor, weight: Tensor | None) -> Tensor:
    """Turn pixel blocks [12, F, H, W] into colours [3, F, 2H, 2W], blended, clamped to [-1, 1]."""
    video = unpatchify_pixels(blocks[None])[0]
    if weight is not None:
        video = video / weight
    return video.clamp(-1, 1)


def cost(blocks: Tensor, weight: Tensor | None, truncate: bool) -> Cost:
    """Count one read and one byte written per value; add, halve, scale, clamp, round."""
    flops = (5 if truncate else 6) * blocks.numel()
    return Cost(flops=flops, bytes=blocks.numel() * (blocks.element_size() + 1))


def check_blocks(name: str, blocks: Tensor, weight: Tensor | None) -> None:
    """Raise ValueError for pixel blocks that the kernels do not take."""
    shape = tuple(blocks.shape)
    require(blocks.dim() == 4 and shape[0] == 12, name, "blocks [12, F, H, W]", shape)
    require(blocks.numel() > 0, name, "at least one block", shape)
    require(blocks.dtype == torch.float32, name, "fp32", blocks.dtype)
    if weight is None:
        return
    columns = (2 * shape[3],)
    require(weight.shape == columns, name, f"weight {columns}", tuple(weight.shape))
    require(weight.dtype == torch.float32, name, "a weight in fp32", weight.dtype)
    require(weight.is_contiguous(), name, "a contiguous weight", weight.stride())
    require(weight.device == blocks.device, name, f"weight on {blocks.device}", weight.device)


_op = torch.library.custom_op("pw::pack_frames", reference, mutates_args=())
_op.register_fake(reference)


@_op.register_kernel("cuda")
def run_kernel(blocks: Tensor, weight: Tensor | None, truncate: bool) -> Tensor:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    check_blocks("pack_frames", blocks, weight)
    _, frames, rows, columns = blocks.shape
    height, width = 2 * rows, 2 * columns
    out = blocks.new_empty((frames, height, width, 3), dtype=torch.uint8)
    axes = ("channel", "frame", "row", "column")
    launch(
        _KERNEL,
        (cdiv(width, BLOCK), height, frames),
        {
            "x_ptr": blocks,
            "weight_ptr": blocks if weight is None else weight,
            "out_ptr": out,
            "width": width,
            **{f"x_{axis}": stride for axis, stride in zip(axes, blocks.stride(), strict=True)},
        },
        {"WEIGHTED": weight is not None, "TRUNCATE": truncate, "BLOCK": BLOCK},
        num_warps=4,
    )
    return out


OP = register(Op("pack_frames", reference, cost, run_kernel))
