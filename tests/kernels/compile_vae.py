# SPDX-License-Identifier: Apache-2.0
"""Compile the VAE's kernels for every architecture; print what each takes as JSON.

A program of its own: Triton compiles only in a process that was not told to interpret.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pw_kernels._triton import channel_norm, dup_up, pack_frames
from pw_kernels.ahead_of_time import SHARED_LIMITS, compile_kernel
from pw_kernels.channel_norm import tile_positions
from pw_kernels.pack_frames import BLOCK

WIDTH = 1024  # the widest channels of the decoder
H_STRIDES = [f"h_{of}" for of in ("batch", "channel", "frame", "row", "column")]
X_STRIDES = [f"x_{of}" for of in ("batch", "channel", "frame", "row", "column")]


def norm(dtype: str, *, last: bool) -> tuple[Any, dict[str, str], dict[str, object], int]:
    """channel_norm at its widest; strides of 64 bits, as a 4K chunk needs."""
    tensors = dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}") | {"gamma_ptr": "*fp32"}
    strides = [f"{of}_{what}" for of in ("x", "out") for what in ("batch", "frame", "row")]
    sizes = dict.fromkeys(("positions", *strides), "i64") | {"root": "fp32"}
    constants = {"C": WIDTH, "BLOCK_C": WIDTH, "BLOCK_P": tile_positions(WIDTH)}
    return channel_norm.kernel, tensors | sizes, constants | {"LAST": last, "SILU": True}, 8


def dup(dtype: str, *, last: bool) -> tuple[Any, dict[str, str], dict[str, object], int]:
    """dup_up_add as in the stage that halves the channels."""
    unit = ("h_channel", "x_channel") if last else ("h_column", "x_column")
    constants: dict[str, object] = dict.fromkeys(unit, 1)
    tensors = {"h_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
    sizes = dict.fromkeys(("channels", "frames", "rows", "columns"), "i32")
    strides = {name: "i64" for name in (*H_STRIDES, *X_STRIDES) if name not in unit}
    channels, columns = (128, 8) if last else (4, 256)
    constants |= {"FT": 1, "FS": 2, "REPEATS": 2, "DROPPED": 0}
    constants |= {"BLOCK_C": channels, "BLOCK_W": columns}
    return dup_up.kernel, tensors | sizes | strides, constants, 4


KERNELS = {
    "channel_norm fp32": norm("fp32", last=False),
    "channel_norm bf16 last": norm("bf16", last=True),
    "dup_up_add fp32": dup("fp32", last=False),
    "dup_up_add bf16 last": dup("bf16", last=True),
    "pack_frames": (
        pack_frames.kernel,
        {"video_ptr": "*fp32", "out_ptr": "*u8", "pixels": "i32"},
        {"TRUNCATE": False, "BLOCK": BLOCK},
        4,
    ),
}


def report(name: str, arch: int) -> dict[str, object]:
    """What one kernel takes on one architecture."""
    kernel, signature, constants, num_warps = KERNELS[name]
    undivided = ("frames", "rows", "root")
    compiled = compile_kernel(
        kernel,
        signature,
        constants,
        arch=arch,
        num_warps=num_warps,
        divisible_by_16=[a for a in signature if a not in undivided],
    )
    sass = compiled.sass()
    return {
        "name": name,
        "arch": arch,
        "warps": compiled.num_warps,
        "registers": compiled.registers,
        "stack": compiled.stack_bytes,
        "shared": compiled.shared_bytes,
        "fits": compiled.fits,
        "local": sorted(set(re.findall(r"\b(?:LDL|STL)\b", sass))),
        # of elements in memory: a 4K chunk passes 2^31
        "offsets": re.findall(r"tt\.addptr [^:]*: \S+, (?:tensor<[\dx]*x)?(i\d+)", compiled.ttir),
        "wide_stores": len(re.findall(r"\bSTG\.E\.\S*(?:64|128)", sass)),
    }


if __name__ == "__main__":
    print(json.dumps([report(name, arch) for name in KERNELS for arch in SHARED_LIMITS]))
