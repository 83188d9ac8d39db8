# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled with no GPU: their resources on every architecture, and clear refusals."""

from __future__ import annotations

import sys

import pytest
import triton.backends.nvidia.compiler

from pw_kernels._triton.gate_residual import kernel
from pw_kernels.ahead_of_time import (
    FIRST_CUDA,
    SHARED_LIMITS,
    Toolchain,
    assembler,
    compile_kernel,
)
from pw_kernels.library import ARCHS
from tests.kernels.compiling import assert_resources, compiling, reports_of
from tests.kernels.pointwise import LEAST

REFUSALS = """
import triton
from pw_kernels._triton.gate_residual import kernel
from pw_kernels.ahead_of_time import compile_kernel
types = dict(x_ptr="*fp32", y_ptr="*bf16", gate_ptr="*fp32", out_ptr="*fp32", tokens_per_row="i32")
for more, sizes, aligned in (
    ({}, dict(D=64, BLOCK=64), None),
    (dict(row_stride="i32"), dict(D=64), None),
    (dict(row_stride="i32"), dict(D=64, BLOCK=64), ["stride"]),
):
    try:
        compile_kernel(kernel, types | more, sizes, arch=90, divisible_by_16=aligned)
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_pointwise_kernels_compile_for_every_architecture(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    reports = reports_of(tmp_path_factory, "compile_pointwise")
    assert len(reports) == len(LEAST) * len(SHARED_LIMITS)
    for report in reports:
        assert_resources(report)
        # the two small numbers beside the index of qk_norm_rope's first token
        near = ["i32"] if report["name"] == "qk_norm_rope" else []
        assert report["offsets"] == [*near, "i64"], report
        assert 0 < report["registers"] <= 64, report  # four blocks of eight warps fit
        assert report["wide_loads"] >= 10, report  # 16 bytes at a time
        assert report["warps"] == (4 if report["name"] in ("qk_norm_rope", "guided_update") else 8)


def test_every_gpu_has_an_architecture_that_is_compiled() -> None:
    assert set(ARCHS.values()) == set(SHARED_LIMITS)


@pytest.mark.parametrize("arch", FIRST_CUDA)
def test_an_assembler_too_old_for_an_architecture_is_named(
    arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ptxas:
        version = "12.8"

    monkeypatch.setattr(triton.backends.nvidia.compiler, "get_ptxas", lambda arch: Ptxas())
    assert assembler(100) == "12.8"
    with pytest.raises(RuntimeError, match=rf"sm_{arch}a needs the assembler of CUDA 1.*got 12\.8"):
        assembler(arch)


@pytest.mark.parametrize(("cuda", "driver"), [("12.9", 525), ("13.4", 580)])
def test_code_needs_the_first_driver_of_its_cuda_release(cuda: str, driver: int) -> None:
    assert Toolchain(cuda=cuda, ptx="9.4", elf_abi=8).driver == driver


def test_arguments_that_are_not_the_kernels_are_refused() -> None:
    missing_type, missing_constant, unknown = compiling("-c", REFUSALS).splitlines()
    for line in (missing_type, missing_constant):
        assert line.startswith("kernel expects arguments ['x_ptr', 'y_ptr'")
    assert unknown.startswith("kernel expects divisible_by_16 among ['x_ptr'")
    assert unknown.endswith("got {'stride'}")


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"architectures \[80, 89, 90, 100, 103, .*\], got 75"):
        compile_kernel(kernel, {}, {}, arch=75)


def test_an_interpreted_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel is not a compiled .* unset TRITON_INTERPRET"):
        compile_kernel(kernel, {}, {}, arch=90)


def test_without_triton_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs Triton: pip install"):
        compile_kernel(kernel, {}, {}, arch=90)
