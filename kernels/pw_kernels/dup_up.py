# SPDX-License-Identifier: Apache-2.0
"""The parameterless shortcut around an upsampling stage of the VAE decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from pw_kernels.launcher import cdiv, launch, next_power_of_2
from pw_kernels.op import Cost, Op, register, require, select
from pw_kernels.variant import Kernel

_KERNEL = Kernel("dup_up", do_not_specialize=frozenset({"frames", "rows"}))


def dup_up_add(h: Tensor, x: Tensor, time_factor: int, space_factor: int, *, first: bool) -> Tensor:
    """Duplicate x over h's finer grid and add it to h in place (official DupUp3D).

    Channel o of h at sub-position (a, b, c) gains input channel
    (((o ft + a) fs + b) fs + c) // r, with r = C' ft fs^2 / C repeats.

    Args:
        h: [B, C', T ft (- (ft-1) when first), H fs, W fs], overwritten; fp32 or bf16.
        x: [B, C, T, H, W], same dtype, no memory shared with h.
        time_factor: ft, frames per frame of x.
        space_factor: fs, rows per row and columns per column of x.
        first: x starts a clip; the first ft-1 resulting frames are dropped.

    Returns:
        h.
    """
    triton = select("dup_up_add", h.device) == "triton"
    run = torch.ops.pw.dup_up_add if triton else reference
    run(h, x, time_factor, space_factor, first)
    return h


def reference(h: Tensor, x: Tensor, time_factor: int, space_factor: int, first: bool) -> None:
    """Oracle of `dup_up_add`: adds views of both on one grid, so that nothing is duplicated."""
    ft, fs = time_factor, space_factor
    repeats = h.shape[1] * ft * fs * fs // x.shape[1]
    # Repeats by strides alone wherever r spans whole sub-positions, as in every Wan2.2 decoder.
    x = x.unsqueeze(2).expand(-1, -1, repeats, -1, -1, -1)
    x = x.reshape(x.shape[0], h.shape[1], ft, fs, fs, *x.shape[3:])  # [B, C', ft, fs, fs, T, H, W]
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, C', T, ft, H, fs, W, fs]
    fine = h.unflatten(4, (-1, fs)).unflatten(3, (-1, fs))  # [B, C', T ft, H, fs, W, fs]
    if first:
        fine[:, :, 0].add_(x[:, :, 0, ft - 1])
        fine, x = fine[:, :, 1:], x[:, :, 1:]
    fine.unflatten(2, (-1, ft)).add_(x)


def cost(h: Tensor, x: Tensor, time_factor: int, space_factor: int, first: bool) -> Cost:
    """Count one read and one write of h, one read of x."""
    return Cost(flops=h.numel(), bytes=(2 * h.numel() + x.numel()) * h.element_size())


def _check(h: Tensor, x: Tensor, time_factor: int, space_factor: int, first: bool) -> None:
    name, ft, fs = "dup_up_add", time_factor, space_factor
    require(h.dim() == 5, name, "h [B, C', T', H', W']", tuple(h.shape))
    require(x.dim() == 5, name, "x [B, C, T, H, W]", tuple(x.shape))
    require(x.numel() > 0, name, "at least one position", tuple(x.shape))
    require(ft >= 1 and fs >= 1, name, "factors of at least 1", (ft, fs))
    frames, rows, columns = x.shape[2:]
    frames = frames * ft - (ft - 1) * first
    grid = (x.shape[0], h.shape[1], frames, rows * fs, columns * fs)
    require(h.shape == grid, name, f"h of shape {grid}", tuple(h.shape))
    copies = h.shape[1] * ft * fs * fs
    expected = f"channels of x to divide C' ft fs^2 = {copies}"
    require(copies % x.shape[1] == 0, name, expected, x.shape[1])
    for tensor in (h, x):
        floats = tensor.dtype in (torch.float32, torch.bfloat16)
        require(floats, name, "fp32 or bf16", tensor.dtype)
    require(h.dtype == x.dtype, name, f"x of h's dtype {h.dtype}", x.dtype)
    require(h.device == x.device, name, f"x on {h.device}", x.device)


_op = torch.library.custom_op("pw::dup_up_add", reference, mutates_args=("h",))
_op.register_fake(lambda *_: None)


@_op.register_kernel("cuda")
def run_kernel(h: Tensor, x: Tensor, time_factor: int, space_factor: int, first: bool) -> None:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    _check(h, x, time_factor, space_factor, first)
    batches, channels, frames, rows, columns = h.shape
    block_c, block_w = tile_shape(h)
    tiles = cdiv(channels, block_c) * cdiv(columns, block_w)
    axes = ("batch", "channel", "frame", "row", "column")
    launch(
        _KERNEL,
        (batches * frames * rows * tiles,),
        {
            "h_ptr": h,
            "x_ptr": x,
            "channels": channels,
            "frames": frames,
            "rows": rows,
            "columns": columns,
            **{f"h_{axis}": stride for axis, stride in zip(axes, h.stride(), strict=True)},
            **{f"x_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=True)},
        },
        {
            "FT": time_factor,
            "FS": space_factor,
            "REPEATS": channels * time_factor * space_factor**2 // x.shape[1],
            "DROPPED": time_factor - 1 if first else 0,
            "BLOCK_C": block_c,
            "BLOCK_W": block_w,
        },
        num_warps=4,
    )


def tile_shape(h: Tensor) -> tuple[int, int]:
    """Return channels and columns of a tile of 1024 elements, longer along the contiguous axis."""
    if h.stride(4) == 1:
        wide = min(256, max(32, next_power_of_2(h.shape[4])))
        return 1024 // wide, wide
    return 128, 8


OP = register(Op("dup_up_add", reference, cost, run_kernel))
