# SPDX-License-Identifier: Apache-2.0
"""The VAE's RMS norm over channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.launcher import Kernel, cdiv, launch, next_power_of_2
from pw_kernels.op import Cost, Op, chosen, register, require

_KERNEL = Kernel("channel_norm")
TILE = 16384  # elements a program keeps in registers: 64 a thread with 8 warps


def channel_norm(x: Tensor, gamma: Tensor, *, silu: bool, out: Tensor | None = None) -> Tensor:
    """x / max(|x|_2, 1e-12) * sqrt(C) * gamma over dimension 1, then SiLU where asked.

    Not the eps-inside form of an ordinary RMS norm (official RMS_norm of vae2_2.py). Computed in
    fp32 and rounded once.

    Args:
        x: [B, C, ...], fp32 or bf16. The kernel reads it where it lies as long as the positions
            of a frame have one stride, as in every order but that of a strip of columns, which
            it reads from a copy.
        gamma: [C, 1, ...], broadcastable to x.
        silu: apply SiLU to the result.
        out: where to write the result, such as the frames of a convolution's buffer behind the
            past: x's shape and dtype, no memory shared with x. Its positions have one stride.

    Returns:
        out; without it a new tensor of x's shape, dtype and order of dimensions in memory.

    Raises:
        ValueError: where the kernel was asked for, what it does not take.
    """
    if out is None:
        out = torch.empty_like(x)
    if chosen("channel_norm", x.device).implementation == "triton":
        _check(x, gamma, out)
        torch.ops.pw.channel_norm(x, gamma, silu, out)
        return out
    return reference(x, gamma, silu, out)


def reference(x: Tensor, gamma: Tensor, silu: bool, out: Tensor) -> Tensor:
    """The oracle of `channel_norm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # fp64 stays what it is
    wide = out if out.dtype == dtype else torch.empty_like(x, dtype=dtype)
    wide.copy_(x)
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-12)
    wide.div_(norm).mul_(gamma.to(dtype) * x.shape[1] ** 0.5)
    if silu:
        F.silu(wide, inplace=True)
    return wide if wide is out else out.copy_(wide)


def cost(x: Tensor, gamma: Tensor, silu: bool, out: Tensor | None = None) -> Cost:
    """One read of x, one write of the result. SiLU: negate, exp, add, divide."""
    moved = 2 * x.numel() * x.element_size() + gamma.numel() * gamma.element_size()
    return Cost(flops=(8 if silu else 4) * x.numel(), bytes=moved)


def as_clip(x: Tensor) -> Tensor:
    """[B, C, positions], [B, C, H, W] or [B, C, T, H, W] -> a view [B, C, T, H, W]."""
    return x if x.dim() == 5 else as_clip(x.unsqueeze(2))


def strides(clip: Tensor) -> tuple[int, int, int, int] | None:
    """Strides of batch, frame, position and channel of [B, C, T, H, W].

    None where the positions of a frame have no one stride: in a strip of columns.
    """
    batch, channel, frame, row, column = clip.stride()
    rows, columns = clip.shape[3:]
    if rows > 1 and columns > 1 and row != columns * column:
        return None
    return batch, frame, column if columns > 1 else row, channel


def _check(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    name = "channel_norm"
    require(3 <= x.dim() <= 5, name, "x [B, C, T, H, W], [B, C, H, W] or [B, C, N]", tuple(x.shape))
    require(x.numel() > 0, name, "at least one position", tuple(x.shape))
    require(x.shape[1] <= 1024, name, "at most 1024 channels", x.shape[1])
    for tensor in (x, gamma):
        floats = tensor.dtype in (torch.float32, torch.bfloat16)
        require(floats, name, "fp32 or bf16", tensor.dtype)
    shape = (x.shape[1], *(1,) * (x.dim() - 2))
    require(gamma.shape == shape, name, f"gamma of shape {shape}", tuple(gamma.shape))
    require(gamma.is_contiguous(), name, "gamma contiguous", gamma.stride())
    require(gamma.device == x.device, name, f"gamma on {x.device}", gamma.device)
    require(out.shape == x.shape, name, f"out of shape {tuple(x.shape)}", tuple(out.shape))
    require(out.dtype == x.dtype, name, f"out of x's dtype {x.dtype}", out.dtype)
    require(out.device == x.device, name, f"out on {x.device}", out.device)
    placed = strides(as_clip(out)) is not None
    require(placed, name, "out with one stride between the positions of a frame", out.stride())


@torch.library.custom_op("pw::channel_norm", mutates_args=("out",))
def _op(x: torch.Tensor, gamma: torch.Tensor, silu: bool, out: torch.Tensor) -> None:
    reference(x, gamma, silu, out)


@_op.register_kernel("cuda")
def run_kernel(x: Tensor, gamma: Tensor, silu: bool, out: Tensor) -> None:
    """Launch the kernel; the input was checked by the caller."""
    clip, out_strides = as_clip(x), strides(as_clip(out))
    assert out_strides is not None
    x_strides = strides(clip)
    if x_strides is None:
        clip = clip.clone()
        x_strides = strides(clip)
        assert x_strides is not None
    batches, channels, frames, rows, columns = clip.shape
    block_c = next_power_of_2(channels)
    block_p = tile_positions(block_c)
    sides = ("batch", "frame", "position", "channel")
    launch(
        _KERNEL,
        (cdiv(rows * columns, block_p), frames, batches),
        {
            "x_ptr": clip,
            "gamma_ptr": gamma,
            "out_ptr": out,
            "positions": rows * columns,
            **{f"x_{side}": stride for side, stride in zip(sides, x_strides, strict=True)},
            **{f"out_{side}": stride for side, stride in zip(sides, out_strides, strict=True)},
            "root": channels**0.5,
        },
        {"C": channels, "BLOCK_C": block_c, "BLOCK_P": block_p, "SILU": silu},
        num_warps=8,
    )


def tile_positions(block_c: int) -> int:
    """Positions of a tile: as many as registers hold, 16 of the widest."""
    return min(256, TILE // block_c)


@_op.register_fake
def _fake(x: Tensor, gamma: Tensor, silu: bool, out: Tensor) -> None:
    return None


OP = register(Op("channel_norm", reference, cost, run_kernel))
