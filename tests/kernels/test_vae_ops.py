# SPDX-License-Identifier: Apache-2.0
"""The VAE's operations: kernels against references, references against definitions."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pw_kernels import channel_norm, dup_up_add, pack_frames, upsample2x_conv
from pw_kernels.channel_norm import reference as norm_reference
from pw_kernels.channel_norm import run_kernel as norm_kernel
from pw_kernels.dup_up import reference as dup_reference
from pw_kernels.dup_up import run_kernel as dup_kernel
from pw_kernels.op import OPS, Choice, using
from pw_kernels.pack_frames import reference as pack_reference
from pw_kernels.pack_frames import run_kernel as pack_kernel
from tests.oracle import vae as oracle


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def last(x: Tensor) -> Tensor:
    """x with its channels last in memory."""
    order = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    return x.contiguous(memory_format=order)


def dup_oracle(x: Tensor, *how: int) -> Tensor:
    """The oracle takes one clip at a time."""
    return torch.cat([oracle.dup_up(clip, *how) for clip in x.split(1)])


def gamma_of(channels: int, dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (1 + 0.1 * values(channels, *(1,) * dims, seed=1)).to(dtype)


NORM_INPUTS = {
    "odd": lambda: values(1, 13, 2, 5, 7),
    "batches": lambda: values(2, 8, 1, 3, 300),
    "last": lambda: last(values(2, 24, 3, 5, 7)),
    "last, picture": lambda: last(values(1, 40, 9, 11)),
    "picture of a clip": lambda: values(1, 24, 3, 5, 7)[:, :, 1],
    "picture of a clip, last": lambda: last(values(1, 24, 3, 5, 7))[:, :, 1],
    "strip of columns": lambda: values(1, 8, 2, 3, 20)[..., 4:11],
    "strip of columns, last": lambda: last(values(1, 8, 2, 3, 20))[..., 4:11],
    "half the channels, last": lambda: last(values(1, 16, 2, 3, 5))[:, 8:],
    "frames first": lambda: values(3, 8, 5, 7).transpose(0, 1)[None],
    "one row": lambda: values(1, 8, 2, 1, 9),
    "one column, last": lambda: last(values(1, 8, 2, 9, 1)),
    "no picture": lambda: values(2, 8, 9),
    "one position": lambda: values(1, 48, 1, 1, 1),
    "one channel": lambda: values(1, 1, 2, 3, 5),
    "widest": lambda: values(1, 1024, 1, 3, 7),
    "widest, last": lambda: last(values(1, 1000, 2, 3, 7)),
}


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORM_INPUTS)
def test_channel_norm_kernel(name: str, dtype: torch.dtype, silu: bool) -> None:
    x = NORM_INPUTS[name]().mul(3).to(dtype)
    gamma = gamma_of(x.shape[1], x.dim() - 2)
    got, wanted = norm_kernel(x, gamma, silu), norm_reference(x, gamma, silu)
    assert (got.dtype, got.shape) == (dtype, x.shape)
    assert got.stride() == torch.empty_like(x).stride()
    # bf16: both round once, so they part by one step, 2^-7 at most, and seldom
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=2e-6)
    if dtype == torch.bfloat16:
        assert (got != wanted).float().mean() < 0.01


def test_channel_norm_of_nothing_and_of_little() -> None:
    """The norm is clamped at 1e-12, not added to."""
    gamma = torch.ones(8, 1, 1, 1)
    for scale in (0.0, 1e-30, 1e-13, 1e-10):
        x = torch.full((1, 8, 1, 1, 2), scale)
        wanted = scale / max(scale * 8**0.5, 1e-12) * 8**0.5
        for got in (norm_reference(x, gamma, False), norm_kernel(x, gamma, False)):
            torch.testing.assert_close(got, torch.full_like(x, wanted), rtol=1e-5, atol=0)


def test_channel_norm_rounds_bf16_once_and_fp64_never() -> None:
    x, gamma = values(1, 24, 2, 3, 5, dtype=torch.bfloat16), gamma_of(24, 3)
    exact = F.silu(F.normalize(x.double(), dim=1) * 24**0.5 * gamma.double())
    assert torch.equal(channel_norm(x, gamma, silu=True), exact.bfloat16())
    got = channel_norm(x.double(), gamma.double(), silu=True)
    torch.testing.assert_close(got, exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("c_in", "c_out", "ft", "fs"),
    [(8, 8, 2, 2), (8, 4, 1, 2), (4, 8, 2, 2), (12, 2, 2, 3), (5, 5, 3, 1)],
)
def test_dup_up_add_kernel(c_in: int, c_out: int, ft: int, fs: int, first: bool) -> None:
    x = values(1, c_in, 2, 1, 3)
    frames = 2 * ft - (ft - 1) * first
    h = values(1, c_out, frames, fs, 3 * fs, seed=1)
    wanted = h + dup_oracle(x, c_out, ft, fs, first)
    for order in (torch.clone, last):
        for add in (dup_reference, dup_kernel):
            got = order(h).clone()
            add(got, order(x), ft, fs, first)
            assert torch.equal(got, wanted)


@pytest.mark.parametrize(("order_h", "order_x"), [(torch.clone, last), (last, torch.clone)])
def test_dup_up_add_kernel_in_bf16_and_two_orders(order_h, order_x) -> None:
    x, h = values(1, 8, 1, 2, 3).bfloat16(), values(1, 4, 1, 4, 6, seed=1).bfloat16()
    wanted = h + dup_oracle(x, 4, 1, 2, False)
    got = order_h(h).clone()
    dup_kernel(got, order_x(x), 1, 2, False)
    assert torch.equal(got, wanted)


def test_dup_up_add_kernel_over_batches() -> None:
    x, h = values(2, 4, 1, 1, 2), values(2, 2, 2, 2, 4, seed=1)
    wanted = h + dup_oracle(x, 2, 2, 2, False)
    dup_kernel(h, x, 2, 2, False)
    assert torch.equal(h, wanted)


def test_dup_up_add_kernel_over_several_tiles_and_in_a_strip() -> None:
    x = values(1, 33, 1, 1, 100)[..., 20:50]  # not contiguous
    h = values(1, 132, 1, 1, 30, seed=1)
    wanted = h + dup_oracle(x, 132, 1, 1, False)
    for got in (h.clone(), last(h).clone()):
        dup_kernel(got, x, 1, 1, False)
        assert torch.equal(got, wanted)


def test_dup_up_add_writes_into_h() -> None:
    x, h = values(1, 4, 1, 2, 2), values(1, 4, 2, 4, 4)
    wanted = h + dup_oracle(x, 4, 2, 2, False)
    assert dup_up_add(h, x, 2, 2, first=False) is h
    assert torch.equal(h, wanted)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("shape", [(3, 1, 2, 2), (3, 2, 5, 7), (3, 3, 16, 43), (3, 1, 33, 64)])
def test_pack_frames_kernel(shape: tuple[int, ...], truncate: bool) -> None:
    video = values(*shape)
    # every half step, where rounding half up and half to even part
    steps = torch.arange(min(video[0].numel(), 511)) / 2
    video[1].view(-1)[: len(steps)] = steps / 255 * 2 - 1
    got = pack_kernel(video, truncate)
    assert got.is_contiguous()
    assert torch.equal(got, pack_reference(video, truncate))


@pytest.mark.parametrize("order", [torch.clone, last])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 4, 1, 5), (3, 5, 4, 3)])
def test_upsample2x_conv_is_exact(shape: tuple[int, ...], order: Callable[..., Tensor]) -> None:
    """In fp64, all but equal to doubling and convolving."""
    x, weight = values(*shape).double(), values(7, shape[1], 3, 3, seed=1).double()
    for bias in (None, values(7, seed=2).double()):
        doubled = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
        wanted = F.conv2d(doubled, weight, bias, padding=1)
        got = upsample2x_conv(order(x), order(weight), bias)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


def test_upsample2x_conv_keeps_channels_last() -> None:
    """As a convolution does, where either the picture or the weights have them last."""
    x, weight = values(2, 8, 3, 5), values(8, 8, 3, 3)
    for a, b in ((last(x), last(weight)), (x, last(weight)), (last(x), weight)):
        got = upsample2x_conv(a, b, None)
        assert got.is_contiguous(memory_format=torch.channels_last)


OPCHECKED = {
    "channel_norm": lambda: (values(1, 8, 2, 3, 5), gamma_of(8, 3), True),
    "channel_norm last": lambda: (last(values(2, 8, 2, 3, 5)), gamma_of(8, 3), False),
    "channel_norm frames first": lambda: (
        values(3, 8, 5, 7).transpose(0, 1)[None],
        gamma_of(8, 3),
        True,
    ),
    "channel_norm bf16": lambda: (values(1, 8, 3, 5).bfloat16(), gamma_of(8, 2), True),
    "dup_up_add": lambda: (values(1, 4, 3, 4, 4), values(1, 4, 2, 2, 2), 2, 2, True),
    "pack_frames": lambda: (values(3, 2, 4, 6), True),
}


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.pw, name.split()[0]).default
    torch.library.opcheck(operator, OPCHECKED[name]())


def test_costs() -> None:
    x = torch.empty(2, 8, 3, 5, 7, dtype=torch.bfloat16)  # 1680 elements
    norm = OPS["channel_norm"].cost(x, torch.empty(8, 1, 1, 1), True)
    assert (norm.flops, norm.bytes) == (8 * 1680, 2 * 1680 * 2 + 8 * 4)
    h, x = torch.empty(1, 4, 4, 4, 4), torch.empty(1, 4, 2, 2, 2)  # 256 and 32 elements
    dup = OPS["dup_up_add"].cost(h, x, 2, 2, False)
    assert (dup.flops, dup.bytes) == (256, (2 * 256 + 32) * 4)
    h = torch.empty(1, 4, 3, 4, 4)
    first = OPS["dup_up_add"].cost(h, x, 2, 2, True)
    assert (first.flops, first.bytes) == (192, (2 * 192 + 32) * 4)
    x, weight = torch.empty(2, 3, 4, 5), torch.empty(7, 3, 3, 3)  # 120 and 189 elements
    up = OPS["upsample2x_conv"].cost(x, weight, torch.empty(7))  # 2 * 7 * 8 * 10 results
    assert (up.flops, up.bytes) == (1120 * 25, (120 + 189 + 1120 + 7) * 4)
    pack = OPS["pack_frames"].cost(torch.empty(3, 2, 4, 5), False)  # 120 values
    assert (pack.flops, pack.bytes) == (6 * 120, 5 * 120)


BAD = {
    "norm without positions": (
        "channel_norm",
        lambda: channel_norm(values(2, 8), gamma_of(8, 0), silu=True),
        r"\[B, C, N\], got \(2, 8\)",
    ),
    "norm of nothing": (
        "channel_norm",
        lambda: channel_norm(values(1, 8, 0, 3), gamma_of(8, 2), silu=True),
        r"at least one position, got \(1, 8, 0, 3\)",
    ),
    "norm of too many channels": (
        "channel_norm",
        lambda: channel_norm(values(1, 1025, 3), gamma_of(1025, 1), silu=True),
        "at most 1024 channels, got 1025",
    ),
    "norm in fp16": (
        "channel_norm",
        lambda: channel_norm(values(1, 8, 3).half(), gamma_of(8, 1), silu=True),
        "fp32 or bf16, got torch.float16",
    ),
    "gamma of other channels": (
        "channel_norm",
        lambda: channel_norm(values(1, 8, 3), gamma_of(9, 1), silu=True),
        r"gamma of shape \(8, 1\), got \(9, 1\)",
    ),
    "channels between positions": (
        "channel_norm",
        lambda: channel_norm(values(1, 5, 8, 3).transpose(1, 2), gamma_of(8, 2), silu=True),
        r"before or after both rows and columns, got \(120, 3, 24, 1\)",
    ),
    "h of another grid": (
        "dup_up_add",
        lambda: dup_up_add(values(1, 4, 4, 4, 4), values(1, 4, 2, 2, 2), 2, 2, first=True),
        r"h of shape \(1, 4, 3, 4, 4\), got \(1, 4, 4, 4, 4\)",
    ),
    "channels that do not divide": (
        "dup_up_add",
        lambda: dup_up_add(values(1, 4, 1, 2, 2), values(1, 3, 1, 1, 1), 1, 2, first=False),
        r"channels of x to divide C' ft fs\^2 = 16, got 3",
    ),
    "h and x of two dtypes": (
        "dup_up_add",
        lambda: dup_up_add(
            values(1, 4, 1, 2, 2), values(1, 4, 1, 1, 1).bfloat16(), 1, 2, first=False
        ),
        "x of h's dtype torch.float32, got torch.bfloat16",
    ),
    "a kernel of 5x5": (
        "upsample2x_conv",
        lambda: upsample2x_conv(values(1, 4, 2, 2), values(4, 4, 5, 5), None),
        r"weight \[C', C, 3, 3\], got \(4, 4, 5, 5\)",
    ),
    "four colours": (
        "pack_frames",
        lambda: pack_frames(values(4, 1, 2, 2), truncate=True),
        r"video \[3, F, height, width\], got \(4, 1, 2, 2\)",
    ),
    "colours in bf16": (
        "pack_frames",
        lambda: pack_frames(values(3, 1, 2, 2).bfloat16(), truncate=True),
        "fp32, got torch.bfloat16",
    ),
    "colours last": (
        "pack_frames",
        lambda: pack_frames(values(1, 2, 2, 3).permute(3, 0, 1, 2), truncate=True),
        "video contiguous, got",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks stand before the launch, so they show where the device cannot launch."""
    name, call, message = BAD[case]
    module = sys.modules[OPS[name].reference.__module__]
    choice = Choice("triton", "asked for")
    monkeypatch.setattr(module, "chosen", lambda *_: choice, raising=False)
    with pytest.raises(ValueError, match=f"^pw::{name} wants .*{message}"):
        call()


def test_public_functions_refuse_triton_on_a_cpu() -> None:
    with using("triton"), pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        channel_norm(values(1, 8, 3), gamma_of(8, 1), silu=True)
