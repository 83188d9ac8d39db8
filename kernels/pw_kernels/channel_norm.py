# SPDX-License-Identifier: Apache-2.0
"""The VAE's RMS norm over channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels.cpu_library import normalisable, normalise
from pw_kernels.launcher import cdiv, launch, next_power_of_2
from pw_kernels.op import Cost, Op, register, require, select
from pw_kernels.variant import Kernel

_KERNEL = Kernel("channel_norm")
TILE = 16384  # elements that a program keeps in registers: 64 per thread with 8 warps


def channel_norm(x: Tensor, gamma: Tensor, *, silu: bool, out: Tensor | None = None) -> Tensor:
    """Compute x / max(|x|_2, 1e-12) * sqrt(C) * gamma over dimension 1, then optionally SiLU.

    The norm is clamped, unlike in an ordinary RMS norm, which adds eps under the root (official
    RMS_norm of vae2_2.py). Computed in fp32 and rounded once.

    Args:
        x: [B, C, ...], fp32 or bf16. The kernel reads it in place where the positions of a frame
            have one stride: in every memory order except that of a strip of columns, which is
            copied first.
        gamma: [C, 1, ...], broadcastable to x.
        silu: apply SiLU to the result.
        out: where to write the result, for example the part of a convolution's buffer that
            follows the past frames: x's shape and dtype, no memory shared with x, one stride
            between the positions of a frame.

    Returns:
        out; without it a new tensor of x's shape, dtype and memory order.

    Raises:
        ValueError: input that the kernel does not take, where the kernel was requested.
    """
    if out is None:
        out = torch.empty_like(x)
    chosen = select("channel_norm", x.device)
    if chosen == "triton":
        torch.ops.pw.channel_norm(x, gamma, silu, out)
    elif chosen == "cpu" and normalisable(x, gamma, out):
        normalise(x, gamma, silu, out)
    else:
        reference(x, gamma, silu, out)
    return out


def reference(x: Tensor, gamma: Tensor, silu: bool, out: Tensor) -> None:
    """Oracle of `channel_norm`."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # fp64 stays fp64
    wide = out if out.dtype == dtype else torch.empty_like(x, dtype=dtype)
    wide.copy_(x)
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-12)
    wide.div_(norm).mul_(gamma.to(dtype) * x.shape[1] ** 0.5)
    if silu:
        F.silu(wide, inplace=True)
    if wide is not out:
        out.copy_(wide)


def cost(x: Tensor, gamma: Tensor, silu: bool, out: Tensor | None = None) -> Cost:
    """Count one read of x and one write of the result. SiLU: negate, exp, add, divide."""
    moved = 2 * x.numel() * x.element_size() + gamma.numel() * gamma.element_size()
    return Cost(flops=(8 if silu else 4) * x.numel(), bytes=moved)


def as_clip(x: Tensor) -> Tensor:
    """View [B, C, positions], [B, C, H, W] or [B, C, T, H, W] as [B, C, T, H, W]."""
    return x if x.dim() == 5 else as_clip(x.unsqueeze(2))


def strides(clip: Tensor) -> tuple[int, int, int, int] | None:
    """Return the strides of batch, frame, position and channel of [B, C, T, H, W].

    None where no single stride leads from position to position of a frame: in a strip of columns.
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
    has_strides = strides(as_clip(out)) is not None
    require(has_strides, name, "out with one stride between the positions of a frame", out.stride())


_op = torch.library.custom_op("pw::channel_norm", reference, mutates_args=("out",))
_op.register_fake(lambda *_: None)


@_op.register_kernel("cuda")
def run_kernel(x: Tensor, gamma: Tensor, silu: bool, out: Tensor) -> None:
    """Check the input and launch the kernel. Raises ValueError for what it does not take."""
    _check(x, gamma, out)
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
    axes = ("batch", "frame", "position", "channel")
    launch(
        _KERNEL,
        (cdiv(rows * columns, block_p), frames, batches),
        {
            "x_ptr": clip,
            "gamma_ptr": gamma,
            "out_ptr": out,
            "positions": rows * columns,
            **{f"x_{axis}": stride for axis, stride in zip(axes, x_strides, strict=True)},
            **{f"out_{axis}": stride for axis, stride in zip(axes, out_strides, strict=True)},
            "root": channels**0.5,
        },
        {"C": channels, "BLOCK_C": block_c, "BLOCK_P": block_p, "SILU": silu},
        num_warps=8,
    )


def tile_positions(block_c: int) -> int:
    """Return how many positions of `block_c` channels the registers of a program hold."""
    return min(256, TILE // block_c)


OP = register(Op("channel_norm", reference, cost, run_kernel, libraries=("cpu",)))
