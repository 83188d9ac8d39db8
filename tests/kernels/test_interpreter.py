# SPDX-License-Identifier: Apache-2.0
"""The corrected interpreter agrees with torch on bf16 and fp8, bit for bit where torch is exact."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pw_kernels.interpreter import install_exact_casts

NARROW = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def cast_kernel(x_ptr, out_ptr, block: tl.constexpr):
    at = tl.arange(0, block)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, block: tl.constexpr):
    at = tl.arange(0, block)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.store(out_ptr + at, x + y)
    tl.store(out_ptr + block + at, x - y)
    tl.store(out_ptr + 2 * block + at, x * y)
    tl.store(out_ptr + 3 * block + at, (x < y).to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + 4 * block + at, tl.maximum(x, y).to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, size: tl.constexpr):
    row = tl.arange(0, size)[:, None] * size
    column = tl.arange(0, size)[None, :]
    x = tl.load(x_ptr + row + column)
    y = tl.load(y_ptr + row + column)
    tl.store(out_ptr + row + column, tl.dot(x, y))


@triton.jit
def sum_kernel(x_ptr, out_ptr, block: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, block)), axis=0))


def numbers(count: int) -> Tensor:
    """Numbers within every format's range, from subnormal to large, and both zeros."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(count).uniform_(-20, 8, generator=generator)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    values = signs * 2.0**exponents
    values[:2] = torch.tensor([0.0, -0.0])
    return values


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


@pytest.mark.parametrize("source", [torch.float32, torch.float16, *NARROW])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, *NARROW])
def test_casts_are_those_of_torch(source: torch.dtype, target: torch.dtype) -> None:
    x = numbers(4096).to(source)
    out = torch.empty(4096, dtype=target)
    cast_kernel[(1,)](x, out, block=4096)
    assert torch.equal(bits(out), bits(x.to(target)))


@pytest.mark.parametrize("target", NARROW)
def test_all_codes_survive_the_way_through_fp32(target: torch.dtype) -> None:
    integer = torch.uint8 if target.itemsize == 1 else torch.int16
    count = 2 ** (8 * target.itemsize)
    codes = torch.arange(count).to(integer).view(target)
    codes = torch.where(codes.float().isfinite(), codes.float(), 0.0).to(target)
    wide, back = torch.empty(count), torch.empty_like(codes)
    cast_kernel[(1,)](codes, wide, block=count)
    cast_kernel[(1,)](wide, back, block=count)
    assert torch.equal(wide, codes.float())
    assert torch.equal(bits(back), bits(codes))


def test_a_tie_goes_to_the_even_neighbour_and_nan_stays() -> None:
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, float("nan")])
    out = torch.empty(4, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, block=4)
    assert out[:3].tolist() == [1.0, 1 + 2**-6, -1.0]
    assert out[3].isnan()


@pytest.mark.parametrize(
    ("target", "largest"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)]
)
def test_fp8_saturates_as_on_a_gpu(target: torch.dtype, largest: float) -> None:
    x = torch.tensor([1e6, -1e6, float("inf"), -float("inf")])
    out = torch.empty(4, dtype=target)
    cast_kernel[(1,)](x, out, block=4)
    assert out.float().tolist() == [largest, -largest, largest, -largest]


def test_bf16_arithmetic_rounds_once() -> None:
    x, y = numbers(1024).bfloat16(), numbers(1024).flip(0).bfloat16()
    out = torch.empty(5, 1024, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, block=1024)
    want = torch.stack([x + y, x - y, x * y, (x < y).bfloat16(), torch.maximum(x, y)])
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *NARROW])
def test_dot_multiplies_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 32, generator=generator).to(dtype)
    y = torch.randn(32, 32, generator=generator).to(dtype)
    out = torch.empty(32, 32)
    dot_kernel[(1,)](x, y, out, size=32)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-6, atol=1e-5)


def test_a_sum_of_bf16_is_refused() -> None:
    x, out = torch.ones(16, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(Exception, match=r"tl.sum expects fp32 when interpreted, got bf16"):
        sum_kernel[(1,)](x, out, block=16)


def test_a_second_call_changes_nothing() -> None:
    builder = triton.runtime.interpreter.InterpreterBuilder
    before = dict(vars(builder))
    install_exact_casts()
    assert dict(vars(builder)) == before


def run(code: str) -> str:
    """Run code in a new process without TRITON_INTERPRET; return what it prints."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_a_triton_that_compiles_is_refused() -> None:
    code = (
        "from pw_kernels.interpreter import install_exact_casts\n"
        "try: install_exact_casts()\n"
        "except RuntimeError as error: print(error)"
    )
    assert "set TRITON_INTERPRET=1 before anything imports triton" in run(code)


def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.interpreter.InterpreterBuilder, "pw_exact", False)
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    with pytest.raises(RuntimeError, match=r"Triton 3.6, 3.7, 3.8, 3.9, got 4.0.0: pip install"):
        install_exact_casts()
