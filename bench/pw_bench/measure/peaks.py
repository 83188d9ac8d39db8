# SPDX-License-Identifier: Apache-2.0
"""The best rates of this machine, measured in the same run as what is compared with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from pw_bench.measure.timing import Protocol, time_all
from pw_bench.results import Ceiling, Ceilings


def measure_ceilings(device: torch.device, protocol: Protocol) -> Ceilings:
    """Time a matrix product, an attention, a 3-D convolution and a copy of random numbers.

    They are large and in bf16 on a GPU, small and in fp32 on a CPU, since few CPUs have matrix
    products in bf16.
    """
    ceilings = _measure(device, protocol)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # gigabytes that the programs measured next may need
    return ceilings


def _measure(device: torch.device, protocol: Protocol) -> Ceilings:
    large = device.type == "cuda"
    dtype = torch.bfloat16 if large else torch.float32
    width = 8192 if large else 1024
    tokens, heads = (16384, 24) if large else (1024, 4)
    channels, side = (512, 128) if large else (128, 48)
    elements = 2**31 if large else 2**24

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    a, b = randn(width, width), randn(width, width)
    q, k, v = (randn(1, heads, tokens, 128) for _ in range(3))
    layout = torch.channels_last_3d
    x = randn(1, channels, 3, side, side).contiguous(memory_format=layout)
    weight = randn(channels, channels, 3, 3, 3).contiguous(memory_format=layout)
    source = torch.randn(elements // 64, device=device).bfloat16().repeat(64)
    target = torch.empty_like(source)
    with torch.inference_mode():
        runs: dict[str, Callable[[], object]] = {
            "gemm": lambda: a @ b,
            "attention": lambda: F.scaled_dot_product_attention(q, k, v),
            "convolution": lambda: F.conv3d(x, weight, padding=(0, 1, 1)),
            "copy": lambda: target.copy_(source),
        }
        timings = time_all(runs, device, protocol)
    name = str(dtype).removeprefix("torch.")
    work = {
        "gemm": (f"[{width}, {width}] @ the same, {name}", 2 * width**3),
        "attention": (
            f"{heads} heads of 128, {tokens} tokens, {name}",
            4 * heads * tokens**2 * 128,
        ),
        "convolution": (
            f"3x3x3, {channels} channels, {side}x{side}, {name}",
            2 * channels**2 * 27 * side**2,
        ),
        "copy": (f"{elements >> 19} MiB", 4 * elements),  # of 2 bytes, read and written
    }
    ceilings = {
        key: Ceiling(work=text, rate=amount / timings[key].median, figure=timings[key])
        for key, (text, amount) in work.items()
    }
    return Ceilings(**ceilings)
