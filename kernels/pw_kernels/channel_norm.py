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


def channel_norm(x: Tensor, gamma: Tensor, *, silu: bool) -> Tensor:
    """x / max(|x|_2, 1e-12) * sqrt(C) * gamma over dimension 1, then SiLU where asked.

    Not the eps-inside form of an ordinary RMS norm (official RMS_norm of vae2_2.py). Computed in
    fp32 and rounded once.

    Args:
        x: [B, C, ...], fp32 or bf16. The kernel reads it where it lies as long as the positions
            of a frame have one stride (contiguous, channels-last, frames first); a strip of
            columns it reads from a copy.
        gamma: [C, 1, ...], broadcastable to x.
        silu: apply SiLU to the result.

    Returns:
        Same shape, dtype and order of dimensions in memory as x.
    """
    if chosen("channel_norm", x.device).implementation == "triton":
        _check(x, gamma)
        out: Tensor = torch.ops.pw.channel_norm(x, gamma, silu)
        return out
    return reference(x, gamma, silu)


def reference(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """The oracle of `channel_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # fp64 stays what it is
    normed = F.normalize(wide, dim=1).mul_(x.shape[1] ** 0.5).mul_(gamma)
    return (F.silu(normed, inplace=True) if silu else normed).to(x.dtype)


def cost(x: Tensor, gamma: Tensor, silu: bool) -> Cost:
    """One read of x, one write of the result. SiLU: negate, exp, add, divide."""
    moved = 2 * x.numel() * x.element_size() + gamma.numel() * gamma.element_size()
    return Cost(flops=(8 if silu else 4) * x.numel(), bytes=moved)


def as_clip(x: Tensor) -> Tensor:
    """[B, C, positions], [B, C, H, W] or [B, C, T, H, W] -> a view [B, C, T, H, W]."""
    return x if x.dim() == 5 else as_clip(x.unsqueeze(2))


def channels_last(clip: Tensor) -> bool | None:
    """Whether channels stand in memory after the rows and columns of a frame, or before both.

    None where they stand between, as no convolution leaves them. Where frames stand does not
    matter.
    """
    grid = [clip.stride(i) for i in (3, 4) if clip.shape[i] > 1]
    if not grid or clip.shape[1] == 1 or clip.stride(1) >= max(grid):
        return False
    return True if clip.stride(1) < min(grid) else None


def _check(x: Tensor, gamma: Tensor) -> None:
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
    ordered = channels_last(as_clip(x)) is not None
    require(ordered, name, "channels before or after both rows and columns", x.stride())


@torch.library.custom_op("pw::channel_norm", mutates_args=())
def _op(x: torch.Tensor, gamma: torch.Tensor, silu: bool) -> torch.Tensor:
    return reference(x, gamma, silu)


@_op.register_kernel("cuda")
def run_kernel(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """Launch the kernel; the input was checked by the caller."""
    out = torch.empty_like(x)
    clip, last = as_clip(x), channels_last(as_clip(x))
    assert last is not None
    strides, out_strides = _strides(clip, last), _strides(as_clip(out), last)
    assert out_strides is not None
    if strides is None:
        clip, strides = as_clip(torch.empty_like(x).copy_(x)), out_strides
    batches, channels, frames, rows, columns = clip.shape
    block_c = next_power_of_2(channels)
    block_p = tile_positions(block_c)
    sides = ("batch", "frame", "row")
    launch(
        _KERNEL,
        (cdiv(rows * columns, block_p), frames, batches),
        {
            "x_ptr": clip,
            "gamma_ptr": gamma,
            "out_ptr": out,
            "positions": rows * columns,
            **{f"x_{side}": stride for side, stride in zip(sides, strides, strict=True)},
            **{f"out_{side}": stride for side, stride in zip(sides, out_strides, strict=True)},
            "root": channels**0.5,
        },
        {"C": channels, "BLOCK_C": block_c, "BLOCK_P": block_p, "LAST": last, "SILU": silu},
        num_warps=8,
    )
    return out


def tile_positions(block_c: int) -> int:
    """Positions of a tile: as many as registers hold, 16 of the widest."""
    return min(256, TILE // block_c)


def _strides(clip: Tensor, last: bool) -> tuple[int, int, int] | None:
    """Strides of batch, frame and row; None where the positions of a frame have no one stride."""
    batch, channel, frame, row, column = clip.stride()
    channels, rows, columns = clip.shape[1], *clip.shape[3:]
    if rows > 1 and columns > 1 and row != columns * column:
        return None
    step = column if columns > 1 else row
    if rows == columns == 1:
        step = channels if last else 1
    if last:
        return (batch, frame, step) if channel == 1 else None
    return (batch, frame, channel) if step == 1 else None


@_op.register_fake
def _fake(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    return torch.empty_like(x)


OP = register(Op("channel_norm", reference, cost))
