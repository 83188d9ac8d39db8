# SPDX-License-Identifier: Apache-2.0
"""The VAE's convolutions and its wide attention: exact, and bounded at the true sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pw_kernels import causal_conv3d, chunked_attention, phase_taps, upsample2x_conv
from pw_kernels.attention.chunked import SCORE_BYTES
from pw_kernels.attention.chunked import reference as attention_reference
from pw_kernels.causal_conv3d import LARGEST, slice_sizes
from pw_kernels.op import OPS
from tests.closeness import max_abs
from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.test_vae_ops import last, values

# C, C', kernel, frames with the past, rows, columns: the decoder's at 3840x2144, later chunks
CONVOLUTIONS_4K = {
    "coarsest 3x3x3": (1024, 1024, (3, 3, 3), 3, 134, 240),
    "stage 2, wide": (1024, 512, (3, 3, 3), 6, 536, 960),
    "stage 3, wide": (512, 256, (3, 3, 3), 6, 1072, 1920),
    "stage 3, 1x1x1": (512, 256, (1, 1, 1), 4, 1072, 1920),
    "stage 3": (256, 256, (3, 3, 3), 6, 1072, 1920),
    "head": (256, 12, (3, 3, 3), 6, 1072, 1920),
}


class Sizes(TorchDispatchMode):
    """Elements of the largest input of a convolution, and bytes of the largest result of any."""

    def __init__(self) -> None:
        super().__init__()
        self.largest_convolved = self.largest_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.largest_convolved = max(self.largest_convolved, args[0].numel(), out.numel())
        if isinstance(out, Tensor):
            self.largest_bytes = max(self.largest_bytes, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("order", [torch.clone, last])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 1, 1), (2, 3, 5)])
def test_causal_conv3d_of_chunks_is_that_of_the_clip(
    kernel: tuple[int, int, int], order: Callable[..., Tensor]
) -> None:
    """The past stands in the buffer; the clip starts behind zeros. In fp64, to rounding."""
    clip, weight = values(1, 5, 6, 4, 7).double(), values(3, 5, *kernel, seed=1).double()
    bias = values(3, seed=2).double()
    history, beside = kernel[0] - 1, (kernel[1] // 2, kernel[2] // 2)
    expected = F.conv3d(F.pad(clip, (0, 0, 0, 0, history, 0)), weight, bias, padding=(0, *beside))
    padded = F.pad(clip, (0, 0, 0, 0, history, 0))
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        buffer = order(padded[:, :, start : stop + history])
        got = causal_conv3d(buffer, order(weight), bias)
        assert max_abs(got, expected[:, :, start:stop]) <= 1e-13


@pytest.mark.parametrize("order", [torch.clone, last])
@pytest.mark.parametrize("largest", [700, 420, 340])
def test_causal_conv3d_in_slices_is_the_same(
    largest: int, order: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of several frames, of one, and of rows of one."""
    module = sys.modules[causal_conv3d.__module__]
    x, weight = order(values(1, 5, 7, 6, 4).double()), order(values(6, 5, 3, 3, 3).double())
    bias = values(6).double()
    expected = causal_conv3d(x, weight, bias)
    monkeypatch.setattr(module, "LARGEST", largest)
    with Sizes() as sizes:
        got = causal_conv3d(x, weight, bias)
    assert sizes.largest_convolved <= largest
    assert max_abs(got, expected) <= 1e-13
    channels_last = order is last
    assert got.is_contiguous() != channels_last
    assert got.is_contiguous(memory_format=torch.channels_last_3d) == channels_last


@pytest.mark.parametrize("name", CONVOLUTIONS_4K)
def test_convolutions_at_4k_stay_within_32_bits(name: str) -> None:
    c_in, c_out, kernel, frames, rows, columns = CONVOLUTIONS_4K[name]
    x = torch.empty((1, c_in, frames, rows, columns), device="meta")
    x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.empty((c_out, c_in, *kernel), device="meta")
    with Sizes() as sizes:
        got = causal_conv3d(x, weight, None)
    assert got.shape == (1, c_out, frames - kernel[0] + 1, rows, columns)
    assert sizes.largest_convolved <= LARGEST


def test_slices_are_as_large_as_they_may_be() -> None:
    weight = (256, 512, 3, 3, 3)
    assert slice_sizes((1, 512, 6, 720, 1280), weight, LARGEST) == (2, 720)  # 2K
    frames, rows = slice_sizes((1, 512, 6, 1072, 1920), weight, LARGEST)  # 4K: not one frame
    assert (frames, rows) == (1, LARGEST // (512 * 3 * 1920) - 2)
    assert slice_sizes((1, 8, 6, 4, 4), (8, 8, 3, 3, 3), LARGEST) == (4, 4)


@pytest.mark.parametrize("order", [torch.clone, last])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 4, 1, 5), (3, 5, 4, 3)])
def test_upsample2x_conv_is_exact(shape: tuple[int, ...], order: Callable[..., Tensor]) -> None:
    """In fp64, all but equal to doubling and convolving."""
    x, weight = values(*shape).double(), values(7, shape[1], 3, 3, seed=1).double()
    for bias in (None, values(7, seed=2).double()):
        doubled = F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
        expected = F.conv2d(doubled, weight, bias, padding=1)
        got = upsample2x_conv(order(x), phase_taps(order(weight)), bias)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_upsample2x_conv_keeps_channels_last() -> None:
    """A convolution does too, where either the picture or the weights have them last."""
    x, weight = values(2, 8, 3, 5), values(8, 8, 3, 3)
    for a, b in ((last(x), last(weight)), (x, last(weight)), (last(x), weight)):
        got = upsample2x_conv(a, phase_taps(b), None)
        assert got.is_contiguous(memory_format=torch.channels_last)
    for taps in phase_taps(last(weight)):
        assert taps.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 33, 1000])
def test_chunked_attention_is_attention(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that divide the queries and rows that do not; large logits, one of them positive."""
    module = sys.modules[chunked_attention.__module__]
    q, k, v = (values(99, 1024, dtype=dtype, seed=seed) for seed in range(3))
    q[5] *= 30
    monkeypatch.setattr(module, "SCORE_BYTES", rows * 99 * 4)
    oracle = F.scaled_dot_product_attention(*(x.double()[None] for x in (q, k, v)))[0]
    expected = attention_reference(q, k, v)
    got = chunked_attention(q, k, v)
    assert got.is_contiguous()
    assert_as_accurate(got, expected, oracle)
    assert max_abs(expected, oracle) <= (1e-5 if dtype == torch.float32 else 2e-2)


def test_chunked_attention_at_4k_is_bounded() -> None:
    """Besides the result, nothing larger than the scores of one step: 4.1 GB would be all."""
    q, k, v = torch.empty((134 * 240, 3072), device="meta").chunk(3, dim=1)
    with Sizes() as sizes:
        out = chunked_attention(q, k, v)
    assert out.shape == (32160, 1024)
    assert sizes.largest_bytes <= SCORE_BYTES
    assert sizes.largest_bytes > SCORE_BYTES * 0.99


def test_costs() -> None:
    x, weight = torch.empty(2, 3, 4, 5), torch.empty(7, 3, 3, 3)  # 120 and 4 * 84 elements
    up = OPS["upsample2x_conv"].cost(x, phase_taps(weight), torch.empty(7))  # 2 * 7 * 80 results
    assert (up.flops, up.bytes) == (1120 * 25, (120 + 336 + 1120 + 7) * 4)
    x, weight = torch.empty(1, 3, 4, 4, 5), torch.empty(7, 3, 3, 3, 3)  # 240 and 567 elements
    conv = OPS["causal_conv3d"].cost(x, weight, torch.empty(7))  # 7 * 2 * 20 results
    assert (conv.flops, conv.bytes) == (280 * (2 * 81 + 1), (240 + 567 + 280 + 7) * 4)
    q, k = torch.empty(10, 8), torch.empty(6, 8)
    attend = OPS["chunked_attention"].cost(q, k, k)
    assert (attend.flops, attend.bytes) == (4 * 10 * 6 * 8, (2 * 80 + 2 * 48) * 4)


BAD = {
    "a kernel of 5x5": (
        lambda: phase_taps(values(4, 4, 5, 5)),
        r"pw::upsample2x_conv expects weight \[C', C, 3, 3\], got",
    ),
    "a weight for taps": (
        lambda: upsample2x_conv(values(1, 4, 2, 2), values(4, 4, 3, 3), None),
        r"pw::upsample2x_conv expects taps \[4, C', 4, 2, 2\], got \(4, 4, 3, 3\)",
    ),
    "a picture": (
        lambda: causal_conv3d(values(4, 4, 2, 2), values(4, 4, 3, 3, 3), None),
        r"pw::causal_conv3d expects x \[B, C, kt-1\+T, H, W\], got \(4, 4, 2, 2\)",
    ),
    "a weight of other channels": (
        lambda: causal_conv3d(values(1, 4, 3, 2, 2), values(4, 5, 3, 3, 3), None),
        r"pw::causal_conv3d expects weight \[C', 4, kt, kh, kw\], got \(4, 5, 3, 3, 3\)",
    ),
    "an even kernel": (
        lambda: causal_conv3d(values(1, 4, 3, 2, 2), values(4, 4, 3, 2, 3), None),
        r"pw::causal_conv3d expects odd kh and kw, got \(2, 3\)",
    ),
    "no room for the past": (
        lambda: causal_conv3d(values(1, 4, 2, 2, 2), values(4, 4, 3, 3, 3), None),
        "pw::causal_conv3d expects 3 frames or more, got 2",
    ),
    "a bias of other channels": (
        lambda: causal_conv3d(values(1, 4, 3, 2, 2), values(4, 4, 3, 3, 3), values(5)),
        r"pw::causal_conv3d expects bias \[4\], got \(5,\)",
    ),
    "a weight of another dtype": (
        lambda: causal_conv3d(values(1, 4, 3, 2, 2), values(4, 4, 3, 3, 3).bfloat16(), None),
        "pw::causal_conv3d expects one dtype, torch.float32, got torch.bfloat16",
    ),
    "heads": (
        lambda: chunked_attention(values(3, 1, 8), values(3, 1, 8), values(3, 1, 8)),
        r"pw::chunked_attention expects q \[S, K\], got \(3, 1, 8\)",
    ),
    "keys of another width": (
        lambda: chunked_attention(values(3, 8), values(3, 9), values(3, 9)),
        r"pw::chunked_attention expects k \[E, 8\], got \(3, 9\)",
    ),
    "values of other positions": (
        lambda: chunked_attention(values(3, 8), values(3, 8), values(4, 8)),
        r"pw::chunked_attention expects v of k's shape \(3, 8\), got \(4, 8\)",
    ),
    "no keys": (
        lambda: chunked_attention(values(3, 8), values(0, 8), values(0, 8)),
        r"pw::chunked_attention expects at least one query and one key, got \(3, 0\)",
    ),
    "keys of another dtype": (
        lambda: chunked_attention(values(3, 8), values(3, 8).half(), values(3, 8).half()),
        "pw::chunked_attention expects q, k and v of one dtype, torch.float32, got torch.float16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
