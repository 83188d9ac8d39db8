# SPDX-License-Identifier: Apache-2.0
"""Both attention kernels as GPUs would run them: compiled here, looked at, never launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ARCHS = {80: (8, 0), 89: (8, 9), 90: (9, 0), 100: (10, 0), 120: (12, 0)}
TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
CASES = [(128, "bf16", False), (64, "fp16", True)]  # width, dtype, bias
COMPILE = """
import json, re, torch
from pw_kernels.ahead_of_time import compile_variant
from pw_kernels.attention import run_kernel
from pw_kernels.launcher import recording

found = []
for arch, gpu in ARCHS.items():
    for width, dtype, bias in CASES:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        q = torch.empty(111600, 24, width, dtype=kind, device="meta")
        with recording(gpu) as variants:
            run_kernel(q, q, q, q[:, 0, 0].contiguous() if bias else None, False)
        (variant,) = variants.values()
        built = compile_variant(variant, arch)
        instructions = sorted(set(re.findall(r"\\b[A-Z][A-Z0-9]{2,}\\b", built.sass())))
        found.append({
            "arch": arch, "case": [width, dtype, bias], "fits": built.fits,
            "stack": built.stack_bytes, "registers": built.registers,
            "shared": built.shared_bytes, "warps": built.num_warps, "sass": instructions,
        })
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, str, bool], Any]:
    """What came out, by arch, head width, dtype and whether there is a bias."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {
        "PYTHONPATH": str(ROOT / "kernels"),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    code = f"ARCHS = {ARCHS}\nCASES = {CASES}\n{COMPILE}"
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return {(one["arch"], *one["case"]): one for one in json.loads(ran.stdout)}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_machine_code(
    compiled: dict[tuple[int, int, str, bool], Any], arch: int, case: tuple[int, str, bool]
) -> None:
    one = compiled[arch, *case]
    assert one["fits"], f"{one['shared']} bytes of shared memory"
    assert one["stack"] == 0, f"{one['registers']} registers and {one['stack']} bytes of stack"
    assert not {"LDL", "STL"} & set(one["sass"])
    assert TENSOR_CORES[arch] in one["sass"]


@pytest.mark.slow
def test_hopper_kernel_is_warp_specialised(
    compiled: dict[tuple[int, int, str, bool], Any],
) -> None:
    """A producer and two consumer warpgroups: 12 warps of the 4 asked for."""
    one = compiled[90, *CASES[0]]
    assert one["warps"] == 12
    assert {"USETMAXREG", "UTMALDG", "UTMASTG"} <= set(one["sass"])
