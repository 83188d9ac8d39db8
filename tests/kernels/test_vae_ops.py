# SPDX-License-Identifier: Apache-2.0
"""The VAE's norm and shortcut: kernels against references, references against definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pw_bench.official import vae as oracle
from pw_kernels import channel_norm, dup_up_add
from pw_kernels.channel_norm import reference as norm_reference
from pw_kernels.channel_norm import run_kernel as norm_kernel
from pw_kernels.dispatch_anywhere import dispatch_anywhere
from pw_kernels.dup_up import reference as dup_reference
from pw_kernels.dup_up import run_kernel as dup_kernel
from pw_kernels.op import OPS, using


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
    got, expected = torch.empty_like(x), torch.empty_like(x)
    norm_kernel(x, gamma, silu, got)
    norm_reference(x, gamma, silu, expected)
    # bf16: both round once, so they part by one step, 2^-7 at most, and seldom
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=2e-6)
    if dtype == torch.bfloat16:
        assert (got != expected).float().mean() < 0.01


def test_channel_norm_of_nothing_and_of_little() -> None:
    """The norm is clamped at 1e-12, not added to."""
    gamma = torch.ones(8, 1, 1, 1)
    for scale in (0.0, 1e-30, 1e-13, 1e-10):
        x = torch.full((1, 8, 1, 1, 2), scale)
        expected = scale / max(scale * 8**0.5, 1e-12) * 8**0.5
        for norm in (norm_reference, norm_kernel):
            got = torch.empty_like(x)
            norm(x, gamma, False, got)
            torch.testing.assert_close(got, torch.full_like(x, expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("order", [torch.clone, last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_norm_writes_into_the_frames_of_a_buffer(dtype: torch.dtype, order) -> None:
    """Whatever the order of x: a convolution on a CPU may leave channels first. The past stays."""
    x, gamma = order(values(1, 24, 3, 5, 7, dtype=dtype)), gamma_of(24, 3)
    expected = channel_norm(x, gamma, silu=True)
    for norm in (norm_reference, norm_kernel):
        buffer = last(values(1, 24, 5, 5, 7, dtype=dtype, seed=2))
        past = buffer[:, :, :2].clone()
        norm(x, gamma, True, buffer[:, :, 2:])
        assert torch.equal(buffer[:, :, :2], past)
        tolerance = 2e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(buffer[:, :, 2:], expected, rtol=tolerance, atol=2e-6)


def test_channel_norm_keeps_the_order_in_memory() -> None:
    for x in (values(1, 8, 2, 3, 5), last(values(1, 8, 2, 3, 5))):
        assert channel_norm(x, gamma_of(8, 3), silu=False).stride() == x.stride()
    x = values(1, 8, 2, 3, 5)
    assert channel_norm(x, gamma_of(8, 3), silu=True, out=x.clone()[:]).shape == x.shape


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
    expected = h + dup_oracle(x, c_out, ft, fs, first)
    for order in (torch.clone, last):
        for add in (dup_reference, dup_kernel):
            got = order(h).clone()
            add(got, order(x), ft, fs, first)
            assert torch.equal(got, expected)


@pytest.mark.parametrize(("order_h", "order_x"), [(torch.clone, last), (last, torch.clone)])
def test_dup_up_add_kernel_in_bf16_and_two_orders(order_h, order_x) -> None:
    x, h = values(1, 8, 1, 2, 3).bfloat16(), values(1, 4, 1, 4, 6, seed=1).bfloat16()
    expected = h + dup_oracle(x, 4, 1, 2, False)
    got = order_h(h).clone()
    dup_kernel(got, order_x(x), 1, 2, False)
    assert torch.equal(got, expected)


def test_dup_up_add_kernel_over_batches() -> None:
    x, h = values(2, 4, 1, 1, 2), values(2, 2, 2, 2, 4, seed=1)
    expected = h + dup_oracle(x, 2, 2, 2, False)
    dup_kernel(h, x, 2, 2, False)
    assert torch.equal(h, expected)


def test_dup_up_add_kernel_over_several_tiles_and_in_a_strip() -> None:
    x = values(1, 33, 1, 1, 100)[..., 20:50]  # not contiguous
    h = values(1, 132, 1, 1, 30, seed=1)
    expected = h + dup_oracle(x, 132, 1, 1, False)
    for got in (h.clone(), last(h).clone()):
        dup_kernel(got, x, 1, 1, False)
        assert torch.equal(got, expected)


def test_dup_up_add_writes_into_h() -> None:
    x, h = values(1, 4, 1, 2, 2), values(1, 4, 2, 4, 4)
    expected = h + dup_oracle(x, 4, 2, 2, False)
    assert dup_up_add(h, x, 2, 2, first=False) is h
    assert torch.equal(h, expected)


OPCHECKED = {
    "channel_norm": lambda: norm_arguments(values(1, 8, 2, 3, 5)),
    "channel_norm last": lambda: norm_arguments(last(values(2, 8, 2, 3, 5))),
    "channel_norm frames first": lambda: norm_arguments(values(3, 8, 5, 7).transpose(0, 1)[None]),
    "channel_norm bf16": lambda: norm_arguments(values(1, 8, 1, 3, 5).bfloat16()),
    "dup_up_add": lambda: (values(1, 4, 3, 4, 4), values(1, 4, 2, 2, 2), 2, 2, True),
}


def norm_arguments(x: Tensor) -> tuple[Tensor, Tensor, bool, Tensor]:
    """The operator's, with a part of a buffer as its result."""
    buffer = last(values(x.shape[0], x.shape[1], x.shape[2] + 2, *x.shape[3:], dtype=x.dtype))
    return x, gamma_of(x.shape[1], 3), True, buffer[:, :, 2:]


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
    "out of another shape": (
        "channel_norm",
        lambda: channel_norm(
            values(1, 8, 2, 3, 5), gamma_of(8, 3), silu=True, out=values(1, 8, 4, 3, 5)
        ),
        r"out of shape \(1, 8, 2, 3, 5\), got \(1, 8, 4, 3, 5\)",
    ),
    "out of another dtype": (
        "channel_norm",
        lambda: channel_norm(
            values(1, 8, 3), gamma_of(8, 1), silu=True, out=values(1, 8, 3).bfloat16()
        ),
        "out of x's dtype torch.float32, got torch.bfloat16",
    ),
    "out a strip of columns": (
        "channel_norm",
        lambda: channel_norm(
            values(1, 8, 3, 5), gamma_of(8, 2), silu=True, out=values(1, 8, 3, 9)[..., :5]
        ),
        "out with one stride between the positions of a frame, got",
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
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    name, call, message = BAD[case]
    with (
        using("triton"),
        dispatch_anywhere(),
        pytest.raises(ValueError, match=f"^pw::{name} expects .*{message}"),
    ):
        call()


def test_public_functions_refuse_triton_on_a_cpu() -> None:
    with using("triton"), pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        channel_norm(values(1, 8, 3), gamma_of(8, 1), silu=True)
