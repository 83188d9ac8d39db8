# SPDX-License-Identifier: Apache-2.0
"""The C++ for CPUs: as accurate as its definition allows, the same bits however work is divided."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pw_kernels import causal_conv3d, channel_norm, cpu_library
from pw_kernels.op import using
from pw_runtime.system.cpu_kernels import open_cpu_kernels
from pw_runtime.system.machine import cpp_compiler
from tests.closeness import max_abs, relative_l2
from tests.kernels.test_vae_ops import last, values
from tests.tolerance import assert_as_accurate, ulp


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    if reason := open_cpu_kernels(lambda line: None):
        pytest.skip(reason)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, *, rows_given: bool = False) -> Tensor:
    assert cpu_library.convolvable(x, weight, bias, rows_given)
    with torch.inference_mode(), using("reference", causal_conv3d="cpu"):
        return causal_conv3d(x, weight, bias, rows_given=rows_given)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, rows_given: bool = False) -> Tensor:
    wide = None if bias is None else bias.double()
    padding = (0, 0 if rows_given else 1, 1)
    return F.conv3d(x.double(), weight.double(), wide, padding=padding)


def term_by_term(x: Tensor, weight: Tensor, places: int = 1000) -> tuple[Tensor, Tensor]:
    """Sum the terms of some outputs one after the other in fp32, and exactly: [places] each.

    That is the convolution as it is defined, on any CPU: how oneDNN groups its sums, and so how
    small its error is, depends on the instruction set.
    """
    generator = torch.Generator().manual_seed(3)
    sizes = (len(weight), *(n - k + 1 for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)))
    chosen = [torch.randint(n, (places,), generator=generator).tolist() for n in sizes]
    sums, exact_sums = [], []
    for c, *corner in zip(*chosen, strict=True):
        inside = (slice(a, a + k) for a, k in zip(corner, weight.shape[2:], strict=True))
        products = (x[0][:, *inside] * weight[c]).flatten().numpy()
        sums.append(float(np.cumsum(products, dtype=np.float32)[-1]))
        exact_sums.append(float(products.astype(np.float64).sum()))
    return torch.tensor(sums), torch.tensor(exact_sums)


def assert_rounds_as_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, given: bool) -> None:
    """At most four times the error of oneDNN or of sums in order (docs/numerics.md)."""
    got, true = winograd(x, weight, bias, rows_given=given), exact(x, weight, bias, given)
    twin = causal_conv3d(x, weight, bias, rows_given=given)
    assert got.shape == twin.shape
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    pairs = [(twin, true), term_by_term(x, weight)]
    most, mean = (max(error(*pair) for pair in pairs) for error in (max_abs, relative_l2))
    assert max_abs(got, true) <= 4 * most + ulp(true, torch.float32)
    assert relative_l2(got, true) <= 4 * mean + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("c_in", "c_out", "frames", "rows", "columns"),
    [
        (1, 1, 4, 19, 23),  # sizes that 4 does not divide, one channel
        (3, 5, 2, 18, 50),
        (16, 12, 4, 16, 24),  # the head
        (48, 64, 1, 22, 40),  # the first convolution
        (16, 40, 3, 21, 33),  # vectors of filters that make no pair
        (130, 70, 1, 20, 20),
        (1024, 64, 1, 24, 20),  # several blocks of filters at full size
    ],
)
def test_winograd_is_the_convolution_to_rounding(c_in, c_out, frames, rows, columns, given) -> None:
    x = last(values(1, c_in, frames + 2, rows, columns))
    weight = last(values(c_out, c_in, 3, 3, 3, seed=1)) / (27 * c_in) ** 0.5
    for bias in (values(c_out, seed=2), None):
        assert_rounds_as_winograd(x, weight, bias, given)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_winograd_takes_any_taps_batches_and_strides(taps: int) -> None:
    """x as a view into wider rows, weights in PyTorch's own order, a batch of two."""
    buffer = last(values(2, 32, taps + 3, 30, 41))
    x = buffer[:, :, 1:, 3:26, 2:39]
    weight = values(24, 32, taps, 3, 3, seed=1) / (9 * taps * 32) ** 0.5
    assert weight.is_contiguous()
    assert_rounds_as_winograd(x, weight, values(24, seed=2), False)


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    """x [1, 32, 7, 42, 37] (five frames and two before them), weight, bias."""
    weight = last(values(48, 32, 3, 3, 3, seed=1)) / 29
    return last(values(1, 32, 7, 42, 37)), weight, values(48, seed=2)


def test_memory_of_winograd_is_fp32_on_the_cpu_whatever_the_defaults_of_pytorch_are(
    case: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: with bf16 as the default the C++ wrote behind the end of its workspace."""
    own, made, elements = cpu_library.library(), list[Tensor](), list[int]()

    class Recorded(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.empty:
                made.append(result)
            return result

    def instead(call: object, parallel: object) -> None:
        elements.append(own.c.pw_winograd_workspace(call))

    monkeypatch.setattr(own.c, "pw_winograd", instead)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), Recorded():
            winograd(*case)
    finally:
        torch.set_default_dtype(before)
    out, workspace = made
    assert workspace.nbytes == 4 * elements[0]
    assert (out.device.type, workspace.device.type) == ("cpu", "cpu")


def test_threads_do_not_change_a_bit(case: tuple[Tensor, Tensor, Tensor]) -> None:
    once = winograd(*case)
    with on_threads(3):
        assert torch.equal(winograd(*case), once)


def test_blocks_do_not_change_a_bit(case, monkeypatch: pytest.MonkeyPatch) -> None:
    once = winograd(*case)
    for tiles, filters in ((1, 16), (7, 32), (1000, 1000)):
        monkeypatch.setattr(cpu_library, "_blocks", lambda *_, b=(tiles, filters): b)
        assert torch.equal(winograd(*case), once)


def test_chunks_of_frames_do_not_change_a_bit(case: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias = case
    parts = [winograd(x[:, :, a : b + 2], weight, bias) for a, b in ((0, 1), (1, 5))]
    assert torch.equal(torch.cat(parts, dim=2), winograd(x, weight, bias))


def test_bands_of_whole_tiles_do_not_change_a_bit(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """Rows from a multiple of four on, with one more above and below."""
    x, weight, bias = case
    got = winograd(x[:, :, :, 15:34], weight, bias, rows_given=True)
    assert torch.equal(got[:, :, :, :16], winograd(x, weight, bias)[:, :, :, 16:32])


def test_infinity_and_nan_reach_their_tiles_and_no_others(case) -> None:
    x, weight, bias = case
    clean = winograd(x, weight, bias)
    for bad in (float("inf"), float("nan")):
        spoilt = x.clone()
        spoilt[0, 3, 2, 10, 9] = bad
        got = winograd(spoilt, weight, bias)
        touched = ~got.isfinite().all(dim=1)[0]  # [T, H, W]
        assert touched[:3, 9:12, 8:11].all()  # what reads it, in all three frames
        assert not touched[3:].any()
        assert torch.equal(got[:, :, :, 16:], clean[:, :, :, 16:])
        assert torch.equal(got[..., 16:], clean[..., 16:])


def test_denormal_features_give_what_they_should(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """Sums of denormals: no flush to zero, an error of the smallest numbers at most."""
    x, weight, _ = case
    tiny = x * 1e-39
    error = max_abs(winograd(tiny, weight, None), exact(tiny, weight, None))
    assert error <= 2.0**-149 * 32 * 27


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.double(), w.double()),
        lambda x, w: (x.bfloat16(), w.bfloat16()),
        lambda x, w: (x.contiguous(), w),
        lambda x, w: (x, w[:, :, :, 1:2]),
        lambda x, w: (x[:, :, :3, :8, :16], w),
        lambda x, w: (x.to("meta"), w.to("meta")),
    ],
    ids=["fp64", "bf16", "channels first", "1x3 kernel", "few tiles", "meta"],
)
def test_what_winograd_does_not_take_is_the_reference(case, change: Callable) -> None:
    x, weight = change(*case[:2])
    assert not cpu_library.convolvable(x, weight, None, False)
    with torch.inference_mode(), using("reference", causal_conv3d="cpu"):
        got = causal_conv3d(x, weight, None)
    want = causal_conv3d(x, weight, None)
    assert got.shape == want.shape
    assert got.is_meta or torch.equal(got, want)


def test_gradients_are_those_of_the_reference(case: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias = case
    weight = weight.clone().requires_grad_()
    with using("reference", causal_conv3d="cpu"):
        causal_conv3d(x, weight, bias).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels", [16, 64, 240])
def test_norm_is_as_accurate_as_the_reference(channels: int, silu: bool) -> None:
    """Into a view of a buffer, as the decoder does, and for huge, tiny and zero positions."""
    x = last(values(1, channels, 3, 17, 21))
    x[:, :, 0, 0], x[:, :, 0, 1], x[:, :, 0, 2] = 0, x[:, :, 0, 1] * 1e15, x[:, :, 0, 2] * 1e-12
    gamma = values(channels, 1, 1, 1, seed=1)
    wide = torch.empty_like(x, dtype=torch.float64)
    channel_norm(x.double(), gamma.double(), silu=silu, out=wide)
    twin = channel_norm(x, gamma, silu=silu)
    buffer = last(torch.full((1, channels, 5, 19, 21), 7.0))
    out = buffer[:, :, 2:, 1:18]
    with using("reference", channel_norm="cpu"):
        assert cpu_library.normalisable(x, gamma, out)
        channel_norm(x, gamma, silu=silu, out=out)
        assert torch.equal(channel_norm(x, gamma, silu=silu), out)
        with on_threads(3):
            assert torch.equal(channel_norm(x, gamma, silu=silu), out)
    assert_as_accurate(out, twin, wide)
    assert (buffer[:, :, :2] == 7).all()  # nothing beside the view is written
    assert (buffer[:, :, :, 0] == 7).all()


def test_norm_of_nan_and_infinity_is_not_finite() -> None:
    x = last(values(1, 32, 1, 5, 5))
    x[0, 3, 0, 1, 1], x[0, 4, 0, 2, 2] = float("nan"), float("inf")
    gamma = torch.ones(32, 1, 1, 1)
    with using("reference", channel_norm="cpu"):
        got = channel_norm(x, gamma, silu=True)
    assert got[0, :, 0, 1, 1].isnan().all()
    assert got[0, 4, 0, 2, 2].isnan()
    assert got[..., 3:, 3:].isfinite().all()


@pytest.mark.slow
def test_instructions_are_compiled_that_this_cpu_lacks(tmp_path, monkeypatch) -> None:
    """AVX-512 is the same source; here it is compiled at least."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert "avx512" in cpu_library.file_name()
    command = cpu_library.compile_command(cpp_compiler(), tmp_path / "library.so")
    run = subprocess.run([*command, "-Wall", "-Wextra", "-Werror"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_vectors_of_16_give_the_bits_of_vectors_of_8(tmp_path) -> None:
    """What runs on a CPU with AVX-512, with that instruction set emulated: also widths between."""
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip("it emulates AVX-512 by AVX2")
    emulated = tmp_path / "emulated.so"
    command = cpu_library.compile_command(cpp_compiler(), emulated)
    header = Path(__file__).parent / "avx512_emulated.h"
    wider = [*command, "-Wno-psabi", "-include", str(header)]
    subprocess.run(wider, check=True, capture_output=True)
    own, cases = cpu_library.library(), []
    for channels, filters in ((3, 5), (8, 16), (16, 12), (24, 40), (48, 17), (64, 200), (100, 64)):
        for frames, rows, columns in ((1, 19, 23), (3, 8, 20), (4, 17, 9)):
            x = last(values(1, channels, 2 + frames, rows, columns))
            cases.append((x, values(filters, channels, 3, 3, 3), values(filters)))
    results = []
    for path in (own.path, emulated):
        cpu_library.open_library(path)
        results.append(
            [winograd(*case, rows_given=given) for case in cases for given in (False, True)]
        )
    cpu_library.open_library(own.path)
    for narrow, wide in zip(*results, strict=True):
        assert torch.equal(narrow, wide)
