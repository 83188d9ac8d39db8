# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at best, measured in the same run as what is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pw_bench.timing import Protocol, time_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """The rates that percentages refer to."""

    gemm_flops: float  # per second: a square product of random numbers: bf16, on a CPU fp32
    copy_bytes: float  # per second, read and written
    gemm_samples_ms: tuple[float, ...]
    copy_samples_ms: tuple[float, ...]


def measure_ceilings(device: torch.device, protocol: Protocol) -> Ceilings:
    """Time one matrix product and one copy: 8192 wide and 4 GiB on a GPU, small on a CPU."""
    large = device.type == "cuda"
    width, elements = (8192, 2**31) if large else (1024, 2**24)
    kind = torch.bfloat16 if large else torch.float32  # few CPUs have products in bf16
    a, b = (torch.randn(width, width, device=device).to(kind) for _ in range(2))
    source = torch.randn(elements // 64, device=device).bfloat16().repeat(64)
    target = torch.empty_like(source)
    work = {"gemm": lambda: a @ b, "copy": lambda: target.copy_(source)}
    timings = time_all(work, device, protocol)
    gemm, copy = timings["gemm"], timings["copy"]
    return Ceilings(
        gemm_flops=2 * width**3 / gemm.median * 1e3,
        copy_bytes=2 * source.numel() * source.element_size() / copy.median * 1e3,
        gemm_samples_ms=gemm.samples,
        copy_samples_ms=copy.samples,
    )
