# SPDX-License-Identifier: Apache-2.0
"""The VAE decoder's operations in the kernel benchmark, at the sizes of its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pw_kernels
from pw_bench.choices import CaseSize
from pw_bench.kernels.cases import BF16, GRIDS, Arguments, Case, CaseTensors, rows_of
from pw_kernels.dup_up import reference as dup_up_reference
from pw_kernels.pack_frames import reference as rgb_reference
from pw_kernels.pack_yuv import reference as yuv_reference
from pw_kernels.upsample2x import phase_taps

FRAMES = 4  # of the last two stages, per latent frame
TINY = 32  # divides every width in tiny cases
EDGE = 4  # rows at the lower edge that are computed exactly


def decoder_cases(size: CaseSize, tensors: CaseTensors) -> Iterator[Case]:
    """Yield the operations on one chunk of frames, channels last."""
    small = TINY if size == "tiny" else 1
    yield _norm(size, tensors, 512 // small, grow=4)
    yield _conv(size, tensors, 512 // small, grow=4)
    yield _conv(size, tensors, 256 // small, grow=8)
    yield _upsample(size, tensors, 512 // small, grow=4)
    yield _dup_up(size, tensors, 512 // small, grow=4)
    yield _attention(size, tensors, 1024 // small)
    yield _pack(size, tensors, "pack_frames")
    yield _pack(size, tensors, "pack_yuv")


def _lower_edge(out: Tensor) -> Tensor:
    return out[..., -EDGE:, :]


def _case(
    op: str,
    name: str,
    size: CaseSize,
    tensors: CaseTensors,
    arguments: Callable[[], Arguments],
    exact: Callable[[Arguments], Tensor],
    *,
    call: Callable[..., Any] | None = None,
) -> Case:
    return Case(
        op=op,
        name=name,
        size=size,
        arguments=arguments,
        call=call or getattr(pw_kernels, op),
        result=lambda out, _: out,
        sample=_lower_edge,
        exact=exact,
        implementations=tensors.implementations(op),
    )


def _clip(
    size: CaseSize, tensors: CaseTensors, channels: int, grow: int, frames: int, seed: int = 0
) -> Tensor:
    """Return [1, C, frames, rows, columns] bf16, channels last, `grow` times the latent size."""
    _, rows, columns = GRIDS[size]
    shape = (frames, 2 * grow * rows, 2 * grow * columns, channels)
    return tensors(*shape, dtype=BF16, seed=seed).permute(3, 0, 1, 2)[None]


def _norm(size: CaseSize, tensors: CaseTensors, channels: int, grow: int) -> Case:
    """Return the case of norm and SiLU."""

    def arguments() -> Arguments:
        gamma = 1 + tensors(channels, 1, 1, 1, seed=1) / 4
        return _clip(size, tensors, channels, grow, FRAMES), gamma, True

    def exact(arguments: Arguments) -> Tensor:
        x, gamma, _ = arguments
        edge = _lower_edge(x).double()
        return F.silu(F.normalize(edge, dim=1) * channels**0.5 * gamma.double())

    def call(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
        return pw_kernels.channel_norm(x, gamma, silu=silu)

    name = f"norm, SiLU, {channels}"
    return _case("channel_norm", name, size, tensors, arguments, exact, call=call)


def _conv(size: CaseSize, tensors: CaseTensors, channels: int, grow: int) -> Case:
    """Return the case of a 3x3x3 convolution of two past frames and four new ones."""

    def arguments() -> Arguments:
        weight = tensors(channels, channels, 3, 3, 3, dtype=BF16, seed=1) / (27 * channels) ** 0.5
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        return (
            _clip(size, tensors, channels, grow, 2 + FRAMES),
            weight,
            tensors(channels, dtype=BF16),
        )

    def exact(arguments: Arguments) -> Tensor:
        edge = arguments[0][..., -EDGE - 1 :, :]
        x, weight, bias = (y.double() for y in (edge, *arguments[1:]))
        return _lower_edge(F.conv3d(x, weight, bias, padding=(0, 1, 1)))

    name = f"conv3d, {channels}"
    return _case("causal_conv3d", name, size, tensors, arguments, exact)


def _upsample(size: CaseSize, tensors: CaseTensors, channels: int, grow: int) -> Case:
    """Return the case of doubling and its convolution, on the frames of a chunk."""

    def arguments() -> Arguments:
        weight = tensors(channels, channels, 3, 3, dtype=BF16, seed=1) / (9 * channels) ** 0.5
        taps = phase_taps(weight.contiguous(memory_format=torch.channels_last))
        frames = _clip(size, tensors, channels, grow, FRAMES)[0].transpose(0, 1)
        return frames, taps, tensors(channels, dtype=BF16)

    def exact(arguments: Arguments) -> Tensor:
        """Compute the lower rows from the same taps: two rows of x make four of the result."""
        x, taps, bias = arguments
        edge = x[..., -EDGE:, :].double()
        return _lower_edge(pw_kernels.upsample2x_conv(edge, taps.double(), bias.double()))

    name = f"upsample2x conv, {channels}"
    return _case("upsample2x_conv", name, size, tensors, arguments, exact)


def _dup_up(size: CaseSize, tensors: CaseTensors, channels: int, grow: int) -> Case:
    """Return the case of the shortcut into the last stage, which halves the channels in place."""

    def arguments() -> Arguments:
        h = _clip(size, tensors, channels // 2, 2 * grow, FRAMES)
        return h, _clip(size, tensors, channels, grow, FRAMES, seed=1), 1, 2, False

    def exact(arguments: Arguments) -> Tensor:
        h, x = arguments[0][..., -EDGE:, :].double(), arguments[1][..., -EDGE // 2 :, :].double()
        dup_up_reference(h, x, *arguments[2:])  # adds in place
        return h

    def call(h: Tensor, x: Tensor, time: int, space: int, first: bool) -> Tensor:
        return pw_kernels.dup_up_add(h, x, time, space, first=first)

    return _case("dup_up_add", "shortcut", size, tensors, arguments, exact, call=call)


def _attention(size: CaseSize, tensors: CaseTensors, width: int) -> Case:
    """Return the case of the middle block's attention over one latent frame."""
    positions = 4 * GRIDS[size][1] * GRIDS[size][2]
    rows = rows_of(positions, tensors.device)

    def arguments() -> Arguments:
        return tuple(tensors(positions, width, seed=seed) for seed in range(3))

    def exact(arguments: Arguments) -> Tensor:
        q, k, v = (x.double() for x in arguments)
        return (q[rows] @ k.T * width**-0.5).softmax(-1) @ v

    case = _case("chunked_attention", "middle attention", size, tensors, arguments, exact)
    return replace(case, sample=lambda out: out[rows])


def _pack(size: CaseSize, tensors: CaseTensors, op: str) -> Case:
    """Return the case of a chunk packed to bytes; the lower pixel rows are computed exactly."""
    _, rows, columns = GRIDS[size]

    def arguments() -> Arguments:
        blocks = tensors(12, FRAMES, 16 * rows, 16 * columns) / 2
        return (blocks, None, False) if op == "pack_frames" else (blocks, "yuv420p", None)

    def exact(arguments: Arguments) -> Tensor:
        edge = arguments[0][:, :, -EDGE:].double()
        if op == "pack_frames":
            return rgb_reference(edge, None, False).double()
        return yuv_reference(edge, "yuv420p", None)[:, : 2 * EDGE].double()

    def sample(out: Tensor) -> Tensor:
        if op == "pack_frames":
            return out[:, -2 * EDGE :]
        luma = out.shape[1] // 3 * 2
        return out[:, luma - 2 * EDGE : luma]

    def call(*arguments: Any) -> Tensor:
        if op == "pack_frames":
            return pw_kernels.pack_frames(*arguments[:2], truncate=arguments[2])
        return pw_kernels.pack_yuv(*arguments)

    case = _case(op, op, size, tensors, arguments, exact, call=call)
    return replace(case, sample=sample)
