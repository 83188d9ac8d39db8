# SPDX-License-Identifier: Apache-2.0
"""What every engine can do, and the check that an engine computes what its segment does."""

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
    padded: bool  # every named dimension must have its limit: the caller pads

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Compute `outputs` from `inputs`; none of them may overlap.

        Raises ValueError for tensors that the spec does not allow, EngineError when the
        computation fails.
        """
        ...


SegmentFunction = Callable[..., tuple[Tensor, ...]]

# Largest relative L2 distance to fp32 that a result in each precision may have in the self-check;
# measured distances are far below (docs/engines.md).
TOLERANCES: dict[DType, float] = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 2e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far an engine is from the eager segment on random data."""

    output: str
    error: float  # relative L2
    tolerance: float

    @property
    def good(self) -> bool:
        """Whether the engine may be used; NaN is not good."""
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
        One entry per output. The tolerance is that of the coarsest dtype among the engine's
        tensors.
    """
    spec = engine.spec
    sizes = dict(spec.limits)
    if not engine.padded:  # a size that nothing was specialised for
        sizes = {name: max(SMALLEST, limit * 2 // 5) for name, limit in sizes.items()}
    inputs = random_inputs(spec, sizes, device, seed)
    outputs = [
        torch.full(one.sized(sizes), float("nan"), dtype=DTYPES[one.dtype], device=device)
        for one in spec.outputs
    ]
    engine.run(inputs, outputs)
    wanted = segment(*inputs)
    kinds: set[DType] = {one.dtype for one in (*spec.inputs, *spec.outputs)}
    tolerance = max(TOLERANCES[kind] for kind in kinds if kind in TOLERANCES)
    return [
        Parity(output=one.name, error=relative_l2(got, want), tolerance=tolerance)
        for one, got, want in zip(spec.outputs, outputs, wanted, strict=True)
    ]


def require_parity(name: str, found: Sequence[Parity]) -> None:
    """Raise EngineError with the numbers where an output is outside its tolerance."""
    bad = [one for one in found if not one.good]
    if bad:
        figures = ", ".join(f"{one.output} {one.error:.1e} > {one.tolerance:.1e}" for one in bad)
        raise EngineError(
            f"{name} does not compute what its segment does (relative L2: {figures}): it is not "
            "used; run with --policy eager, and please report it"
        )


def random_inputs(
    spec: EngineSpec, sizes: dict[str, int], device: torch.device, seed: int
) -> list[Tensor]:
    """Tensors for an engine's inputs: random, weights of 1/sqrt(fan in), the rest of unit size.

    Whole numbers are 3, 4, 5 ...: places and sizes, and none of them 0.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for one in spec.inputs:
        shape = one.sized(sizes)
        if one.dtype == "int64":
            made.append(torch.arange(3, 3 + math.prod(shape), device=device).reshape(shape))
            continue
        x = torch.randn(shape, generator=generator)
        if len(shape) == 2 and not any(isinstance(dim, str) for dim in one.shape):
            x *= shape[1] ** -0.5
        made.append(x.to(DTYPES[one.dtype]).to(device))
    return made


def relative_l2(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| in fp64."""
    distance = (got.double() - wanted.double()).norm()
    return (distance / wanted.double().norm().clamp_min(1e-30)).item()


class Positional(nn.Module):
    """A segment called with its inputs in order, whatever it names them."""

    def __init__(self, segment: nn.Module) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the segment."""
        results: tuple[Tensor, ...] = self.segment(*inputs)
        return results
