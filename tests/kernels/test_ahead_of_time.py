# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled with no GPU: what they take on every architecture, and clear refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pw_kernels._triton.gate_residual import kernel
from pw_kernels.ahead_of_time import SHARED_LIMITS, compile_kernel
from tests.kernels.pointwise import LEAST

ROOT = Path(__file__).parents[2]
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


def compiling(*command: str) -> str:
    """What a Python that compiles kernels prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_pointwise_kernels_compile_for_every_architecture() -> None:
    reports = json.loads(compiling(str(ROOT / "tests/kernels/compile_pointwise.py")))
    assert len(reports) == len(LEAST) * len(SHARED_LIMITS)
    for report in reports:
        suffix = "a" if report["arch"] >= 90 else ""
        assert report["target"] == f"sm_{report['arch']}{suffix}"
        assert report["fits"], report
        assert report["stack"] == 0, report  # nothing spilled
        assert report["local"] == [], report
        # the two small numbers beside the place of qk_norm_rope's first token
        near = ["i32"] if report["name"] == "qk_norm_rope" else []
        assert report["offsets"] == [*near, "i64"], report
        assert 0 < report["registers"] <= 64, report  # four blocks of eight warps fit
        assert report["wide_loads"] >= 10, report  # 16 bytes at a time
        assert report["warps"] == (4 if report["name"] in ("qk_norm_rope", "guided_update") else 8)


def test_arguments_that_are_not_the_kernels_are_refused() -> None:
    missing_type, missing_constant, unknown = compiling("-c", REFUSALS).splitlines()
    for line in (missing_type, missing_constant):
        assert line.startswith("kernel wants arguments ['x_ptr', 'y_ptr'")
    assert unknown.startswith("kernel wants divisible_by_16 among ['x_ptr'")
    assert unknown.endswith("got {'stride'}")


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"for arch \[80, 89, 90, 100, 120\], got 75"):
        compile_kernel(kernel, {}, {}, arch=75)


def test_an_interpreted_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernel is not a compiled .* unset TRITON_INTERPRET"):
        compile_kernel(kernel, {}, {}, arch=90)


def test_without_triton_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs Triton: pip install"):
        compile_kernel(kernel, {}, {}, arch=90)
