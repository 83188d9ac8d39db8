# SPDX-License-Identifier: Apache-2.0
"""The VAE's kernels as five generations of GPU would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pw_kernels.ahead_of_time import SHARED_LIMITS

ROOT = Path(__file__).parents[2]
NORMS = (
    "channel_norm fp32",
    "channel_norm fp32 last",
    "channel_norm bf16 last",
    "channel_norm fp32 first to last",
)
KERNELS = (
    *NORMS,
    "dup_up_add fp32",
    "dup_up_add fp32 last",
    "dup_up_add bf16 last",
    "pack_frames",
    "pack_yuv yuv420p",
    "pack_yuv nv12",
    "pack_yuv p010",
)


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, int], dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT / 'kernels'}"
    program = [sys.executable, str(ROOT / "tests/kernels/compile_vae.py")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {(r["name"], r["arch"]): r for r in json.loads(done.stdout)}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_for_every_architecture(name: str, reports: Any) -> None:
    for arch in SHARED_LIMITS:
        report = reports[name, arch]
        assert report["stack"] == 0, report
        assert report["local"] == [], report
        assert report["fits"], report
        # a block of 8 warps must find room at least once on every multiprocessor
        assert report["registers"] * report["warps"] * 32 <= 65536, report
        assert report["wide_stores"] > 0, report
        narrow = report["offsets"].count("i32")
        if not name.startswith("pack"):  # there, offsets within one row
            assert narrow == (1 if name in NORMS else 0), report  # gamma's, below 1024
