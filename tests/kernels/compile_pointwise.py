# SPDX-License-Identifier: Apache-2.0
"""Compile the pointwise kernels for every architecture; print their resources as JSON."""

from __future__ import annotations

import json
import re

from pw_kernels.ahead_of_time import SHARED_LIMITS, compile_variant
from pw_kernels.launcher import recording
from pw_kernels.variant import Variant
from tests.kernels.compiling import Report, resources
from tests.kernels.pointwise import LEAST, meta_case


def launched(name: str) -> Variant:
    """Return the variant that an operation launches at its true size."""
    case, _ = meta_case(name, "4k")
    with recording((9, 0)) as variants:
        case.module.run_kernel(*case.arguments)
    (variant,) = variants.values()
    return variant


def report(name: str, variant: Variant, arch: int) -> Report:
    compiled = compile_variant(variant, arch)
    return {
        "name": name,
        **resources(compiled),
        # of each token in memory, before columns are added
        "offsets": sorted(set(re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (\w+)", compiled.ttir))),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v[48]\.b32", compiled.ptx)),
    }


if __name__ == "__main__":
    variants = {name: launched(name) for name in LEAST}
    print(json.dumps([report(n, v, arch) for n, v in variants.items() for arch in SHARED_LIMITS]))
