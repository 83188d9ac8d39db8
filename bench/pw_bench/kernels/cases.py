# SPDX-License-Identifier: Apache-2.0
"""Cases of the kernel benchmark: operations on tensors of true sizes, and their exact results.

An exact result is computed in fp64 at sampled rows only, so that full-size results are checked
at full size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pw_bench.choices import CaseSize
from pw_kernels.attention.libraries import available
from pw_kernels.dispatch_anywhere import dispatch_anywhere
from pw_kernels.op import OPS, Cost, Implementation, using

Arguments = tuple[Any, ...]
BF16 = torch.bfloat16

# Token grids (T, H/2, W/2) of the draft and of 2K and 4K clips; latent sizes are twice as wide.
GRIDS: Mapping[CaseSize, tuple[int, int, int]] = {
    "tiny": (2, 3, 2),
    "draft": (31, 8, 14),
    "2k": (31, 45, 80),
    "4k": (31, 67, 120),
}
DIM, HEADS = 3072, 24
SAMPLED = 64  # rows that are compared, besides the first and the last ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation at one size."""

    op: str  # in OPS
    name: str  # in tables
    size: str
    arguments: Callable[[], Arguments]  # the same numbers every time
    call: Callable[..., Any]  # the public function; returns None where it works in place
    result: Callable[[Any, Arguments], Tensor]  # from the call's output and its arguments
    sample: Callable[[Tensor], Tensor]  # the rows to compare
    exact: Callable[[Arguments], Tensor]  # those rows in fp64, from untouched arguments
    implementations: tuple[Implementation, ...]

    def cost(self, arguments: Arguments) -> Cost:
        """Return the FLOPs and bytes of a call."""
        return OPS[self.op].cost(*arguments)

    def run(self, implementation: Implementation, arguments: Arguments) -> Any:
        """Call the operation by one implementation."""
        kernel = implementation == "triton" and not arguments[0].is_cuda
        launch = dispatch_anywhere() if kernel else nullcontext()
        with using("reference", **{self.op: implementation}), launch:
            return self.call(*arguments)


class CaseTensors:
    """Random tensors on a device, and the implementations that can run there."""

    def __init__(self, device: torch.device, *, interpreted: bool = False) -> None:
        self.device, self.interpreted = device, interpreted

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Return normally distributed numbers, the same every time."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.empty(shape, dtype=dtype, device=self.device)
        for rows in x.split(max(1, 2**28 // max(1, x[0].numel()))):  # 1 GiB of fp32 at a time
            rows.copy_(torch.randn(rows.shape, generator=generator, device=self.device))
        return x

    def implementations(self, op: str) -> tuple[Implementation, ...]:
        """Return what can run here.

        On a GPU: the available implementations that fit it. On a CPU: the reference, and the
        Triton kernel if it is interpreted.
        """
        if self.device.type == "cuda":
            hopper = torch.cuda.get_device_capability(self.device) == (9, 0)
            names = [name for name in OPS[op].alternatives if available(name) and name != "cpu"]
            names = [name for name in names if hopper or name != "gluon"]
        else:
            names = [name for name in OPS[op].alternatives if name == "triton" and self.interpreted]
        return ("reference", *names)


def rows_of(count: int, device: torch.device) -> Tensor:
    """Return the first and last eight of `count` rows, and random ones between, in order."""
    some = torch.randint(0, count, (SAMPLED,), generator=torch.Generator().manual_seed(count))
    ends = torch.cat((torch.arange(min(8, count)), torch.arange(max(0, count - 8), count)))
    return torch.cat((some, ends)).unique().to(device)
