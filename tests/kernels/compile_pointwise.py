# SPDX-License-Identifier: Apache-2.0
"""Compile the pointwise kernels for every architecture; print what each takes as JSON.

A program of its own: Triton compiles only in a process that was not told to interpret.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pw_kernels._triton import gate_residual, norm_modulate, qk_norm_rope
from pw_kernels.ahead_of_time import SHARED_LIMITS, compile_kernel
from pw_kernels.row_block import row_block

DIM, HEADS = 3072, 24

KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, object]]] = {
    "norm_modulate": (
        norm_modulate.kernel,
        {
            **{"x_ptr": "*fp32", "shift_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": "*bf16"},
            **{"tokens_per_row": "i32", "row_stride": "i32", "eps": "fp32"},
        },
        {},
    ),
    "gate_residual": (
        gate_residual.kernel,
        {
            **{"x_ptr": "*fp32", "y_ptr": "*bf16", "gate_ptr": "*fp32", "out_ptr": "*fp32"},
            **{"tokens_per_row": "i32", "row_stride": "i32"},
        },
        {},
    ),
    "qk_norm_rope": (
        qk_norm_rope.kernel,
        {
            **{f"{name}_ptr": "*bf16" for name in ("q", "k", "gain_q", "gain_k")},
            **{"cos_ptr": "*fp32", "sin_ptr": "*fp32"},
            **{"q_out_ptr": "*bf16", "k_out_ptr": "*bf16"},
            **{"q_stride": "i32", "k_stride": "i32", "eps": "fp32"},
        },
        {"PAIRS": DIM // HEADS // 2},
    ),
}


def report(name: str, arch: int) -> dict[str, object]:
    """What one kernel takes on one architecture."""
    kernel, signature, constants = KERNELS[name]
    block, num_warps = row_block(DIM)
    strides = [argument for argument in signature if argument.endswith("stride")]
    compiled = compile_kernel(
        kernel,
        signature,
        {"D": DIM, "BLOCK": block, **constants},
        arch=arch,
        num_warps=num_warps,
        divisible_by_16=[a for a in signature if a.endswith("_ptr")] + strides,
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
    print(json.dumps([report(name, arch) for name in KERNELS for arch in SHARED_LIMITS]))
