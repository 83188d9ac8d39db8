# SPDX-License-Identifier: Apache-2.0
"""Turn decoder output into the planes a video encoder takes: BT.709, limited range, 4:2:0."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pw_kernels.launcher import cdiv, launch
from pw_kernels.op import Cost, Op, register, require, select
from pw_kernels.pack_frames import check_blocks
from pw_kernels.variant import Kernel

_KERNEL = Kernel("pack_yuv")
_NAME = "pack_yuv"
BLOCK = 512  # 2x2 pixel blocks per program

YuvLayout = Literal["yuv420p", "nv12", "p010"]
LAYOUTS: tuple[YuvLayout, ...] = ("yuv420p", "nv12", "p010")

RED, GREEN, BLUE = 0.2126, 0.7152, 0.0722  # of luma (ITU-R BT.709)


def pack_yuv(blocks: Tensor, layout: YuvLayout, weight: Tensor | None = None) -> Tensor:
    """Convert the decoder's values to Y, U and V: clamped, rounded once, half to even.

    With R, G, B in [0, 1]: Y' = .2126 R + .7152 G + .0722 B, Y = 16 + 219 Y',
    U = 128 + 224 (B - Y') / 1.8556, V = 128 + 224 (R - Y') / 1.5748 (ITU-R BT.709, limited
    range), all times four for 10 bits. U and V are those of the mean colour of 2x2 pixels, so
    they are sited in the middle of the four, as with libswscale's default.

    Args:
        blocks: [12, F, H, W] fp32, colours in [-1, 1] of 2x2 pixel blocks as the decoder returns
            them (`pw_kernels.pack_frames.unpatchify_pixels`); clamped here.
        layout: "yuv420p": planes Y, U, V; "nv12": plane Y, then U and V interleaved; "p010": like
            nv12 with 10 bits in the upper bits of 16.
        weight: [2W] fp32 by which every pixel column is divided first: the summed weights of
            blended strips.

    Returns:
        [F, 3H, 2W] uint8, uint16 for "p010", contiguous: 2H rows of Y, then U and V, as
        libavutil lays out pictures whose lines have no padding.

    Raises:
        ValueError: an unknown layout; input that the kernel does not take, where the kernel was
            requested.
    """
    require(layout in LAYOUTS, _NAME, f"one of the layouts {', '.join(LAYOUTS)}", layout)
    run = torch.ops.pw.pack_yuv if select(_NAME, blocks.device) == "triton" else reference
    return run(blocks, layout, weight)


def reference(blocks: Tensor, layout: str, weight: Tensor | None) -> Tensor:
    """Oracle of `pack_yuv`."""
    colours = blocks.unflatten(0, (3, 2, 2))  # [3, column, row, F, H, W]
    if weight is not None:
        colours = colours / weight.view(-1, 2).T[:, None, None, None]
    red, green, blue = (colours.clamp(-1, 1) + 1) / 2  # [column, row, F, H, W] each
    mean_red, mean_green, mean_blue = map(_mean_of_four, (red, green, blue))  # [F, H, W]
    grey = _luma(mean_red, mean_green, mean_blue)
    y = (16 + 219 * _luma(red, green, blue)).permute(2, 3, 1, 4, 0)  # [F, H, row, W, column]
    u = 128 + 224 / (2 * (1 - BLUE)) * (mean_blue - grey)
    v = 128 + 224 / (2 * (1 - RED)) * (mean_red - grey)
    if layout == "yuv420p":
        parts = [y.flatten(1), u.flatten(1), v.flatten(1)]
    else:
        parts = [y.flatten(1), torch.stack((u, v), dim=-1).flatten(1)]
    levels = torch.cat(parts, dim=1)
    if layout == "p010":
        levels = levels.mul_(4).round_().to(torch.int32) * 64  # 10 bits, in the upper ones of 16
    else:
        levels.round_()
    return levels.to(_dtype(layout)).view(_shape(blocks))


def _luma(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    return RED * red + GREEN * green + BLUE * blue


def _mean_of_four(colour: Tensor) -> Tensor:
    """Average 2x2 pixels: [column, row, F, H, W] -> [F, H, W]."""
    return (colour[0, 0] + colour[1, 0] + colour[0, 1] + colour[1, 1]) / 4


def _shape(blocks: Tensor) -> tuple[int, int, int]:
    _, frames, rows, columns = blocks.shape
    return frames, 3 * rows, 2 * columns


def _dtype(layout: str) -> torch.dtype:
    return torch.uint16 if layout == "p010" else torch.uint8


def cost(blocks: Tensor, layout: str, weight: Tensor | None) -> Cost:
    """Count one read of the values and half as many samples written.

    Per value: add, halve, clamp twice and a multiply-add of luma; per block: three means of four,
    luma again, two differences; per sample: scale, offset, round.
    """
    samples = blocks.numel() // 2
    flops = 6 * blocks.numel() + 19 * (blocks.numel() // 12) + 3 * samples
    moved = blocks.numel() * blocks.element_size() + samples * _dtype(layout).itemsize
    return Cost(flops=flops, bytes=moved)


_op = torch.library.custom_op("pw::pack_yuv", reference, mutates_args=())
_op.register_fake(reference)


@_op.register_kernel("cuda")
def run_kernel(blocks: Tensor, layout: str, weight: Tensor | None) -> Tensor:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    check_blocks(_NAME, blocks, weight)
    out = blocks.new_empty(_shape(blocks), dtype=_dtype(layout))
    _, frames, rows, columns = blocks.shape
    axes = ("channel", "frame", "row", "column")
    launch(
        _KERNEL,
        (cdiv(columns, BLOCK), rows, frames),
        {
            "x_ptr": blocks,
            "weight_ptr": blocks if weight is None else weight,
            # as int16: the kernel writes the same bits
            "out_ptr": out.view(torch.int16) if layout == "p010" else out,
            "columns": columns,
            **{f"x_{axis}": stride for axis, stride in zip(axes, blocks.stride(), strict=True)},
        },
        {
            "WEIGHTED": weight is not None,
            "PLANAR": layout == "yuv420p",
            "BITS": 10 if layout == "p010" else 8,
            "BLOCK": BLOCK,
        },
        num_warps=4,
    )
    return out


OP = register(Op(_NAME, reference, cost, run_kernel))
