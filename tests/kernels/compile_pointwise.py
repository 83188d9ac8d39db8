# SPDX-License-Identifier: Apache-2.0
"""Compile the pointwise kernels for every architecture; print what each takes as JSON.

A program of its own: Triton compiles only in a process that was not told to interpret.
"""

from __future__ import annotations

import importlib
import json
import re

from pw_kernels.ahead_of_time import SHARED_LIMITS, compile_kernel
from pw_kernels.launcher import recording
from pw_kernels.variant import Variant
from tests.kernels.pointwise import LEAST, meta_case


def launched(name: str) -> Variant:
    """What an operation launches at its true size."""
    case, _ = meta_case(name, "4k")
    with recording((9, 0)) as variants:
        case.module.run_kernel(*case.arguments)
    (variant,) = variants.values()
    return variant


def report(name: str, variant: Variant, arch: int) -> dict[str, object]:
    """What one kernel takes on one architecture."""
    compiled = compile_kernel(
        importlib.import_module(f"pw_kernels._triton.{variant.kernel}").kernel,
        {argument: kind.removesuffix(":16") for argument, kind in variant.types},
        dict(variant.constants),
        arch=arch,
        num_warps=variant.num_warps,
        divisible_by_16=[argument for argument, kind in variant.types if kind.endswith(":16")],
    )
    return {
        "name": name,
        "arch": arch,
        "target": re.findall(r"\.target (\w+)", compiled.ptx)[0],
        "warps": compiled.num_warps,
        "registers": compiled.registers,
        "stack": compiled.stack_bytes,
        "shared": compiled.shared_bytes,
        "fits": compiled.fits,
        "local": sorted(set(re.findall(r"\b(?:LDL|STL)\b", compiled.sass()))),
        # of each token's own place in memory, before columns are added
        "offsets": sorted(set(re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (\w+)", compiled.ttir))),
        "wide_loads": len(re.findall(r"\bLDG\.E\.\S*128", compiled.sass())),
    }


if __name__ == "__main__":
    launches = {name: launched(name) for name in LEAST}
    print(
        json.dumps([report(name, launches[name], arch) for name in LEAST for arch in SHARED_LIMITS])
    )
