# SPDX-License-Identifier: Apache-2.0
"""The parameterless shortcut around an upsampling stage of the VAE decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from pw_kernels.launcher import Kernel, cdiv, launch, next_power_of_2
from pw_kernels.op import Cost, Op, chosen, register, require

_KERNEL = Kernel("dup_up", any_number=frozenset({"frames", "rows"}))


def dup_up_add(h: Tensor, x: Tensor, time_factor: int, space_factor: int, *, first: bool) -> Tensor:
    """Add to h, in place, x spread over h's finer grid by duplication (official DupUp3D).

    Channel o of h at sub-position (a, b, c) gains input channel
    (((o ft + a) fs + b) fs + c) // r, with r = C' ft fs^2 / C repeats.

    Args:
        h: [B, C', T ft (- (ft-1) when first), H fs, W fs], overwritten; fp32 or bf16.
        x: [B, C, T, H, W], same dtype, no memory shared with h.
        time_factor: ft, frames made of one frame.
        space_factor: fs, rows made of one row and columns made of one column.
        first: x starts a clip; its first ft-1 result frames are dropped.

    Returns:
        h.
    """
    if chosen("dup_up_add", h.device).implementation == "triton":
        _check(h, x, time_factor, space_factor, first)
        torch.ops.pw.dup_up_add(h, x, time_factor, space_factor, first)
        return h
    return reference(h, x, time_factor, space_factor, first)


def reference(h: Tensor, x: Tensor, time_factor: int, space_factor: int, first: bool) -> Tensor:
    """The oracle of `dup_up_add`: views of both on one grid, so that nothing is duplicated."""
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
    return h


def cost(h: Tensor, x: Tensor, time_factor: int, space_factor: int, first: bool) -> Cost:
    """One read and one write of h, one read of x."""
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
    wanted = f"channels of x to divide C' ft fs^2 = {copies}"
    require(copies % x.shape[1] == 0, name, wanted, x.shape[1])
    for tensor in (h, x):
        floats = tensor.dtype in (torch.float32, torch.bfloat16)
        require(floats, name, "fp32 or bf16", tensor.dtype)
    require(h.dtype == x.dtype, name, f"x of h's dtype {h.dtype}", x.dtype)
    require(h.device == x.device, name, f"x on {h.device}", x.device)


@torch.library.custom_op("pw::dup_up_add", mutates_args=("h",))
def _op(h: torch.Tensor, x: torch.Tensor, time_factor: int, space_factor: int, first: bool) -> None:
    reference(h, x, time_factor, space_factor, first)


@_op.register_kernel("cuda")
def run_kernel(h: Tensor, x: Tensor, time_factor: int, space_factor: int, first: bool) -> None:
    """Launch the kernel; the input was checked by the caller."""
    batches, channels, frames, rows, columns = h.shape
    block_c, block_w = tile_shape(h)
    tiles = cdiv(channels, block_c) * cdiv(columns, block_w)
    sides = ("batch", "channel", "frame", "row", "column")
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
            **{f"h_{side}": stride for side, stride in zip(sides, h.stride(), strict=True)},
            **{f"x_{side}": stride for side, stride in zip(sides, x.stride(), strict=True)},
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
    """Channels and columns of a tile of 1024 elements, longer along what is contiguous."""
    if h.stride(4) == 1:
        wide = min(256, max(32, next_power_of_2(h.shape[4])))
        return 1024 // wide, wide
    return 128, 8


@_op.register_fake
def _fake(h: Tensor, x: Tensor, time_factor: int, space_factor: int, first: bool) -> None:
    return None


OP = register(Op("dup_up_add", reference, cost, run_kernel))
