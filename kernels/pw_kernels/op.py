# SPDX-License-Identifier: Apache-2.0
"""The one place that decides which implementation of an operation runs.

Every operation has a plain PyTorch `reference`: what a CPU runs, what export traces, and the
oracle of everything faster. Some also have a Triton kernel behind a torch operator
(`torch.ops.pw.<name>`). A public function checks its input, asks `chosen`, and calls one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

Implementation = Literal["reference", "triton"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operation takes at least: floating-point operations and bytes moved."""

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Op:
    """An operation: its name, its oracle, and its cost as a function of the same arguments."""

    name: str
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    triton: bool = True  # there is a Triton kernel


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that runs, and why."""

    implementation: Implementation
    reason: str


OPS: dict[str, Op] = {}
_wanted: Implementation = "reference"  # a plain global: torch.compile guards it


def register(op: Op) -> Op:
    """Add an operation to OPS."""
    assert op.name not in OPS, f"{op.name} is registered twice"
    OPS[op.name] = op
    return op


@contextmanager
def using(implementation: Implementation) -> Iterator[None]:
    """Run the block with this implementation of every operation that has it (process-wide)."""
    global _wanted
    before, _wanted = _wanted, implementation
    try:
        yield
    finally:
        _wanted = before


def chosen(device: torch.device) -> Choice:
    """What runs for tensors on `device`, and why.

    Raises ValueError where Triton was asked for and `device` cannot run it.
    """
    if _wanted == "reference":
        return Choice("reference", "the default; kernels are asked for with --kernels triton")
    if device.type != "cuda":
        raise ValueError(f"Triton kernels need a CUDA device, got {device}; use the reference")
    return Choice("triton", "asked for")


def require(condition: bool, op: str, what: str, got: object) -> None:
    """Raise ValueError naming the operation, what it wants and what it got."""
    if not condition:
        raise ValueError(f"pw::{op} wants {what}, got {got}")


def table() -> str:
    """Every operation, its implementations, and what runs on this machine unless asked."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = chosen(device)
    lines = [f"operations on {device}: {choice.implementation} ({choice.reason})", ""]
    for op in sorted(OPS.values(), key=lambda op: op.name):
        lines.append(f"  {op.name:<20} reference{', triton' if op.triton else ''}")
    return "\n".join(lines)
