# SPDX-License-Identifier: Apache-2.0
"""The engine protocol, and the check that an engine computes what its segment does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pw_engines.spec import DTYPES, SMALLEST, Backend, DType, EngineSpec


class EngineError(Exception):
    """An engine cannot be built, loaded or run; the message says why and what to do."""


class Engine(Protocol):
    """A loaded segment. Inputs and outputs are the caller's, in the order of the spec."""

    spec: EngineSpec
    backend: Backend
    padded: bool  # named dimensions must have their limits: the caller pads
    granularity: int  # calls begin at multiples of so many rows
    scratch: int  # bytes on the device that PyTorch does not allocate, shared by all engines there

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Compute `outputs` from `inputs`; none of them may overlap.

        Raises ValueError for tensors that the spec does not allow, EngineError when the
        computation fails.
        """
        ...


SegmentFunction = Callable[..., tuple[Tensor, ...]]

# Largest relative L2 distance from the eager segment in the self-check, by precision; measured
# distances are far below (docs/engines.md).
TOLERANCES: dict[DType, float] = {
    "fp32": 1e-5,
    "fp16": 4e-3,
    "bf16": 2e-2,
    # Another rounding before a number is quantized may decide another one. It costs less than half
    # of what quantizing does.
    "int8": 4e-3,
    "fp8": 1.5e-2,
    "fp4": 5e-2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Distance of an engine's output from the eager segment's on random data."""

    output: str
    error: float  # relative L2
    tolerance: float

    @property
    def good(self) -> bool:
        """True if the engine may be used; NaN is not good."""
        return self.error <= self.tolerance


def check_parity(
    engine: Engine, segment: SegmentFunction, device: torch.device, *, seed: int = 0
) -> list[Parity]:
    """Run an engine and the segment it was built from on the same random data.

    Args:
        engine: to check.
        segment: the eager segment, called with the engine's inputs.
        device: where both run.
        seed: of the data.

    Returns:
        One entry per output, with the tolerance of the coarsest dtype among the engine's tensors.
    """
    spec = engine.spec
    sizes = dict(spec.limits)
    if not engine.padded:  # a size that nothing is specialised for
        sizes = {name: max(SMALLEST, limit * 2 // 5) for name, limit in sizes.items()}
    inputs = random_inputs(spec, sizes, device, seed)
    outputs = [
        torch.full(tensor.sized(sizes), float("nan"), dtype=DTYPES[tensor.dtype], device=device)
        for tensor in spec.outputs
    ]
    engine.run(inputs, outputs)
    expected = segment(*inputs)
    tolerance = tolerance_of(spec)
    return [
        Parity(output=tensor.name, error=relative_l2(*pair), tolerance=tolerance)
        for tensor, *pair in zip(spec.outputs, outputs, expected, strict=True)
    ]


def tolerance_of(spec: EngineSpec) -> float:
    """Return the largest relative L2 distance of an output from the segment's that is good."""
    dtypes: set[DType] = {tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
    return max(TOLERANCES[dtype] for dtype in dtypes if dtype in TOLERANCES)


def require_parity(name: str, parities: Sequence[Parity]) -> None:
    """Raise EngineError with the numbers where an output is outside its tolerance."""
    bad = [parity for parity in parities if not parity.good]
    if bad:
        figures = ", ".join(f"{x.output} {x.error:.1e} > {x.tolerance:.1e}" for x in bad)
        raise EngineError(
            f"{name} does not compute what its segment does (relative L2: {figures}) and is not "
            "used: run with --policy eager, and please report it"
        )


def random_inputs(
    spec: EngineSpec, sizes: dict[str, int], device: torch.device, seed: int
) -> list[Tensor]:
    """Make random tensors for an engine's inputs: weights of 1/sqrt(fan-in), others of unit size.

    int64 inputs are consecutive numbers, from 3 for small sizes: the index of the first of some
    tokens, and the sizes of their grid, in which the last token is at a position below 1024.
    Quantized weights are made of numbers of the same size, int8 in units of 2^-7; fp8 is positive,
    as it may be a scale.
    """
    generator = torch.Generator().manual_seed(seed)
    first = max(3, math.isqrt(max(sizes.values(), default=0) // 512) + 1)
    inputs = []
    for tensor in spec.inputs:
        shape = tensor.sized(sizes)
        if tensor.dtype == "int64":
            numbers = torch.arange(first, first + math.prod(shape), device=device)
            inputs.append(numbers.reshape(shape))
            continue
        if tensor.dtype == "fp4":
            packed = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            inputs.append(packed.view(DTYPES["fp4"]).to(device))
            continue
        x = torch.randn(shape, generator=generator)
        if len(shape) == 2 and not any(isinstance(dim, str) for dim in tensor.shape):
            x *= shape[1] ** -0.5
        if tensor.dtype == "int8":
            x = (128 * x).round().clamp(-127, 127)
        elif tensor.dtype == "fp8":
            x = x.abs()
        inputs.append(x.to(DTYPES[tensor.dtype]).to(device))
    return inputs


def relative_l2(got: Tensor, expected: Tensor) -> float:
    """Compute |got - expected| / |expected| in fp64."""
    distance = (got.double() - expected.double()).norm()
    return (distance / expected.double().norm().clamp_min(1e-30)).item()


class Positional(nn.Module):
    """A segment called with positional inputs, whatever its parameters are called."""

    def __init__(self, segment: nn.Module) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the segment."""
        results: tuple[Tensor, ...] = self.segment(*inputs)
        return results
