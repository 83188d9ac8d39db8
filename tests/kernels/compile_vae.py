# SPDX-License-Identifier: Apache-2.0
"""Compile the VAE's kernels for every architecture; print their resources as JSON."""

from __future__ import annotations

import json
import re
from typing import Any

from pw_kernels._triton import channel_norm, dup_up, pack_frames, pack_yuv
from pw_kernels.ahead_of_time import SHARED_LIMITS, compile_kernel
from pw_kernels.channel_norm import tile_positions
from pw_kernels.pack_frames import BLOCK
from pw_kernels.pack_yuv import BLOCK as BLOCKS
from tests.kernels.compiling import Report, resources

# kernel, types of its arguments, its constants, warps
Compilation = tuple[Any, dict[str, str], dict[str, object], int]

WIDTH = 1024  # the widest channels of the decoder
UNIT = {"first": "position", "last": "channel"}  # axis of stride 1
NORM_STRIDES = ("batch", "frame", "position", "channel")
AXES = ("batch", "channel", "frame", "row", "column")


def norm(dtype: str, x: str, out: str) -> Compilation:
    """channel_norm at its widest, from one memory order to another, with the 64-bit strides of a
    4K chunk."""
    unit = (f"x_{UNIT[x]}", f"out_{UNIT[out]}")
    strides = [f"{tensor}_{axis}" for tensor in ("x", "out") for axis in NORM_STRIDES]
    tensors = dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}") | {"gamma_ptr": "*fp32"}
    sizes = {name: "i64" for name in ("positions", *strides) if name not in unit}
    constants: dict[str, object] = dict.fromkeys(unit, 1)
    constants |= {"C": WIDTH, "BLOCK_C": WIDTH, "BLOCK_P": tile_positions(WIDTH), "SILU": True}
    return channel_norm.kernel, tensors | sizes | {"root": "fp32"}, constants, 8


def pack(kernel: Any, out: str, **constants: object) -> Compilation:
    """From blocks whose twelve channels are last, with the weights of blended strips."""
    tensors = {"x_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": out}
    size = "columns" if kernel is pack_yuv.kernel else "width"
    sizes = {size: "i32", "x_frame": "i64", "x_row": "i32", "x_column": "i32"}
    return kernel, tensors | sizes, {"x_channel": 1, "WEIGHTED": True, **constants}, 4


def dup(dtype: str, *, last: bool) -> Compilation:
    """dup_up_add as in the stage that halves the channels."""
    unit = ("h_channel", "x_channel") if last else ("h_column", "x_column")
    constants: dict[str, object] = dict.fromkeys(unit, 1)
    tensors = {"h_ptr": f"*{dtype}", "x_ptr": f"*{dtype}"}
    sizes = dict.fromkeys(("channels", "frames", "rows", "columns"), "i32")
    names = [f"{tensor}_{axis}" for tensor in "hx" for axis in AXES]
    strides = {name: "i64" for name in names if name not in unit}
    channels, columns = (128, 8) if last else (4, 256)
    constants |= {"FT": 1, "FS": 2, "REPEATS": 2, "DROPPED": 0}
    constants |= {"BLOCK_C": channels, "BLOCK_W": columns}
    return dup_up.kernel, tensors | sizes | strides, constants, 4


KERNELS = {
    "channel_norm fp32": norm("fp32", "first", "first"),
    "channel_norm fp32 last": norm("fp32", "last", "last"),
    "channel_norm bf16 last": norm("bf16", "last", "last"),
    "channel_norm fp32 first to last": norm("fp32", "first", "last"),
    "dup_up_add fp32": dup("fp32", last=False),
    "dup_up_add fp32 last": dup("fp32", last=True),
    "dup_up_add bf16 last": dup("bf16", last=True),
    "pack_frames": pack(pack_frames.kernel, "*u8", TRUNCATE=False, BLOCK=BLOCK),
    "pack_yuv yuv420p": pack(pack_yuv.kernel, "*u8", PLANAR=True, BITS=8, BLOCK=BLOCKS),
    "pack_yuv nv12": pack(pack_yuv.kernel, "*u8", PLANAR=False, BITS=8, BLOCK=BLOCKS),
    "pack_yuv p010": pack(pack_yuv.kernel, "*i16", PLANAR=False, BITS=10, BLOCK=BLOCKS),
}


def report(name: str, arch: int) -> Report:
    kernel, signature, constants, num_warps = KERNELS[name]
    undivided = ("frames", "rows", "root", "x_column")
    compiled = compile_kernel(
        kernel,
        signature,
        constants,
        arch=arch,
        num_warps=num_warps,
        divisible_by_16=[argument for argument in signature if argument not in undivided],
    )
    return {
        "name": name,
        **resources(compiled),
        # of elements in memory: a 4K chunk passes 2^31
        "offsets": re.findall(r"tt\.addptr [^:]*: \S+, (?:tensor<[\dx]*x)?(i\d+)", compiled.ttir),
        "wide_stores": len(re.findall(r"st\.global\S*\.(?:v2\.b32|v[48]\.b32|b64)", compiled.ptx)),
    }


# Siblings of 100 and 120: the same instructions, scheduled for another chip.
SIBLINGS = (103, 110, 121)
LARGEST = ("channel_norm fp32 last", "channel_norm fp32 first to last", "pack_yuv p010")


if __name__ == "__main__":
    jobs = [
        (name, arch)
        for name in KERNELS
        for arch in SHARED_LIMITS
        if arch not in SIBLINGS or name in LARGEST
    ]
    print(json.dumps([report(name, arch) for name, arch in jobs]))
