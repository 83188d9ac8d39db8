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
CASES = [(128, "bf16", 0), (64, "fp16", 4)]  # width, dtype, biases
COMPILE = """
import json, re
from importlib import import_module
from pw_kernels.attention_variants import variant_for
from pw_kernels.ahead_of_time import compile_kernel

found = []
for arch, capability in ARCHS.items():
    for width, dtype, biases in CASES:
        variant = variant_for(capability, width)
        pointers = ["q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr"]
        strides = ["q_stride", "k_stride", "v_stride"]
        counts = ["n_queries", "n_keys", "n_heads"]
        signature = (
            {name: "*" + dtype for name in pointers}
            | {"lse_ptr": "*fp32"}
            | {name: "i32" for name in counts + strides}
            | {name: "fp32" for name in ("scale", "b0", "b1", "b2", "b3")}
        )
        constants = {"K": width, "N_BIASES": biases}
        constants |= {"BLOCK_M": variant.queries, "BLOCK_N": variant.keys}
        body = import_module("pw_kernels._triton." + variant.kernel.name).kernel
        built = compile_kernel(
            body, signature, constants, arch=arch, num_warps=variant.num_warps,
            num_stages=variant.num_stages, divisible_by_16=pointers + strides,
        )
        instructions = sorted(set(re.findall(r"\\b[A-Z][A-Z0-9]{2,}\\b", built.sass())))
        found.append({
            "arch": arch, "case": [width, dtype, biases], "fits": built.fits,
            "stack": built.stack_bytes, "registers": built.registers,
            "shared": built.shared_bytes, "warps": built.num_warps, "sass": instructions,
        })
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, str, int], Any]:
    """What came out, by arch, head width, dtype and number of biases."""
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
    compiled: dict[tuple[int, int, str, int], Any], arch: int, case: tuple[int, str, int]
) -> None:
    one = compiled[arch, *case]
    assert one["fits"], f"{one['shared']} bytes of shared memory"
    assert one["stack"] == 0, f"{one['registers']} registers and {one['stack']} bytes of stack"
    assert not {"LDL", "STL"} & set(one["sass"])
    assert TENSOR_CORES[arch] in one["sass"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hopper_kernel_is_warp_specialised(
    compiled: dict[tuple[int, int, str, int], Any], case: tuple[int, str, int]
) -> None:
    """A producer and two consumer warpgroups: 12 warps of the 4 asked for."""
    one = compiled[90, *case]
    assert one["warps"] == 12
    assert {"USETMAXREG", "UTMALDG", "UTMASTG"} <= set(one["sass"])
