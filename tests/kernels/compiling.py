# SPDX-License-Identifier: Apache-2.0
"""Compile kernels in a process of its own: Triton compiles only where it does not interpret."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pw_kernels.ahead_of_time import SHARED_LIMITS, Compiled, assembler

ROOT = Path(__file__).parents[2]
Report = dict[str, Any]

# From Triton 3.8 on some kernels spill a few bytes of a thread on sm_80 and sm_89, at the register
# counts that let one more block run: pack_yuv 24 to 32, attention of width 64 with a bias 8 to 16.
SPILLS = 32


def architectures() -> list[int]:
    """Return what the installed Triton can compile for: 3.6 has no assembler for 110."""
    supported = []
    for arch in SHARED_LIMITS:
        with suppress(RuntimeError):
            assembler(arch)
            supported.append(arch)
    return supported


def compiling(*command: str | Path) -> str:
    """Run a Python program without TRITON_INTERPRET; return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    process = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


@contextmanager
def shared_folder(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """Yield a folder that all workers of a test run share, and whether it has to be filled.

    The others wait until the block of the first one has ended.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, complete = base / name, base / f"{name}.complete"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        yield folder, not complete.exists()
        complete.touch()


def reports_of(factory: pytest.TempPathFactory, program: str) -> list[Report]:
    """Run one of the programs beside this file, once per test run; return what it reports."""
    with shared_folder(factory, program) as (folder, is_new):
        path = folder / "reports.json"
        if is_new:
            path.write_text(compiling(ROOT / f"tests/kernels/{program}.py"))
        reports: list[Report] = json.loads(path.read_text())
    return reports


def resources(compiled: Compiled) -> Report:
    """Report what a kernel uses on its architecture, for JSON."""
    return {
        "arch": compiled.arch,
        "target": re.findall(r"\.target (\w+)", compiled.ptx)[0],
        "cuda": compiled.toolchain.cuda,
        "warps": compiled.num_warps,
        "registers": compiled.registers,
        "stack": compiled.stack_bytes,
        "shared": compiled.shared_bytes,
        "fits": compiled.fits,
    }


def assert_resources(report: Report) -> None:
    """Assert that the code is for its own architecture, can be launched, and does not spill."""
    import triton

    arch = report["arch"]
    assert report["target"] == f"sm_{arch}{'a' if arch >= 90 else ''}", report
    assert report["fits"], report
    newer = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
    assert report["stack"] <= (SPILLS if newer and arch in (80, 89) else 0), report
    assert 0 < report["registers"] * report["warps"] * 32 <= 65536, report  # one block fits
