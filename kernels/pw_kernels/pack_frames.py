# SPDX-License-Identifier: Apache-2.0
"""From decoder output to bytes: 8-bit RGB."""

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


def pack_frames(blocks: Tensor, weight: Tensor | None = None, *, truncate: bool) -> Tensor:
    """Turn the decoder's values into 8-bit RGB: clamp((v + 1) / 2 * 255, 0, 255), half to even.

    Args:
        blocks: [12, F, H, W] fp32, colours in [-1, 1] of 2x2 pixel blocks as the decoder makes
            them (`unpatchify_pixels`); clamped here.
        weight: [2W] fp32 that every pixel column is divided by first: the sum of the weights of
            blended strips.
        truncate: cut the fraction off as the official code does, instead of rounding.

    Returns:
        [F, 2H, 2W, 3] uint8, contiguous.

    Raises:
        ValueError: where the kernel was asked for, what it does not take.
    """
    if chosen("pack_frames", blocks.device).implementation == "triton":
        check_blocks("pack_frames", blocks, weight)
        out: Tensor = torch.ops.pw.pack_frames(blocks, weight, truncate)
        return out
    return reference(blocks, weight, truncate)


def reference(blocks: Tensor, weight: Tensor | None, truncate: bool) -> Tensor:
    """The oracle of `pack_frames`."""
    scaled = ((pixels_of(blocks, weight) + 1) / 2 * 255).clamp_(0, 255)
    if not truncate:
        scaled.round_()
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def pixels_of(blocks: Tensor, weight: Tensor | None) -> Tensor:
    """[12, F, H, W] of pixel blocks -> colours [3, F, 2H, 2W], blended and clamped to [-1, 1]."""
    video = unpatchify_pixels(blocks[None])[0]
    if weight is not None:
        video = video / weight
    return video.clamp(-1, 1)


def cost(blocks: Tensor, weight: Tensor | None, truncate: bool) -> Cost:
    """One read of the values, one byte written for each; add, halve, scale, clamp, round."""
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


@torch.library.custom_op("pw::pack_frames", mutates_args=())
def _op(blocks: torch.Tensor, weight: torch.Tensor | None, truncate: bool) -> torch.Tensor:
    return reference(blocks, weight, truncate)


@_op.register_kernel("cuda")
def run_kernel(blocks: Tensor, weight: Tensor | None, truncate: bool) -> Tensor:
    """Launch the kernel; the input was checked by the caller."""
    out = _fake(blocks, weight, truncate)
    frames, height, width, _ = out.shape
    sides = ("channel", "frame", "row", "column")
    launch(
        _KERNEL,
        (cdiv(width, BLOCK), height, frames),
        {
            "x_ptr": blocks,
            "weight_ptr": blocks if weight is None else weight,
            "out_ptr": out,
            "width": width,
            **{f"x_{side}": stride for side, stride in zip(sides, blocks.stride(), strict=True)},
        },
        {"WEIGHTED": weight is not None, "TRUNCATE": truncate, "BLOCK": BLOCK},
        num_warps=4,
    )
    return out


@_op.register_fake
def _fake(blocks: Tensor, weight: Tensor | None, truncate: bool) -> Tensor:
    _, frames, rows, columns = blocks.shape
    return blocks.new_empty((frames, 2 * rows, 2 * columns, 3), dtype=torch.uint8)


OP = register(Op("pack_frames", reference, cost, run_kernel))
