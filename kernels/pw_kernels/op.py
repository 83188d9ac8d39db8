# SPDX-License-Identifier: Apache-2.0
"""Decide which implementation of an operation runs.

Every operation has a plain PyTorch `reference`: what a CPU runs, what export traces, and the
oracle of everything faster. Some also have a Triton kernel behind a torch operator
(`torch.ops.pw.<name>`), whose default implementation is the reference; attention has others
besides, and two have C++ for a CPU ("cpu": cpu_library.py). A public function asks `select` and
calls one of them.

Input is checked where a mistake would go unnoticed: by a kernel's launch function (`run_kernel`),
because a kernel would read past the end of its tensors, and by a public function where PyTorch
would broadcast and carry on. Elsewhere the reference takes what PyTorch takes, and PyTorch's own
errors stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Implementation = Literal[
    "reference", "triton", "gluon", "cudnn", "flash", "flash-attn", "flash-attn-4", "cpu"
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that most kernels take


@dataclass(frozen=True, slots=True)
class Cost:
    """Lower bounds of an operation: floating-point operations and bytes moved."""

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Op:
    """An operation: its name, its oracle, its cost as a function of the same arguments."""

    name: str
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    launch: Callable[..., Any] | None = None  # of the Triton kernel behind torch.ops.pw.<name>
    libraries: tuple[Implementation, ...] = ()  # other implementations

    @property
    def alternatives(self) -> tuple[Implementation, ...]:
        """Implementations besides the reference."""
        kernel: tuple[Implementation, ...] = ("triton",) if self.launch else ()
        return kernel + self.libraries


OPS: dict[str, Op] = {}

# Globals, because torch.compile guards on globals and recompiles when they change.
_requested: dict[str, Implementation] = {}  # by operation
_ignore_device = False  # launch kernels for tensors of any device (pw_kernels.dispatch_anywhere)


def register(op: Op) -> Op:
    """Add an operation to OPS."""
    assert op.name not in OPS, f"{op.name} is registered twice"
    OPS[op.name] = op
    return op


@contextmanager
def using(implementation: Implementation, **by_op: Implementation) -> Iterator[None]:
    """Run the block with this implementation of every operation that has it (process-wide).

    `by_op` overrides it for single operations: using("triton", attention="cudnn").

    Raises ValueError for an unknown operation, or one without the requested implementation.
    """
    global _requested
    for name, requested in by_op.items():
        if name not in OPS:
            raise ValueError(f"unknown operation {name}, expected one of {', '.join(sorted(OPS))}")
        choices = ("reference", *OPS[name].alternatives)
        require(requested in choices, name, f"one of {', '.join(choices)}", requested)
    general = {op.name: implementation for op in OPS.values() if implementation in op.alternatives}
    before, _requested = _requested, general | by_op
    try:
        yield
    finally:
        _requested = before


@contextmanager
def ignore_device() -> Iterator[None]:
    """Let the block select kernels for any device, to record or interpret them."""
    global _ignore_device
    before, _ignore_device = _ignore_device, True
    try:
        yield
    finally:
        _ignore_device = before


def select(name: str, device: torch.device) -> Implementation:
    """Return the implementation of operation `name` that runs for tensors on `device`.

    The reference, unless another one was requested (`using`).

    Raises ValueError where `device` cannot run what was requested.
    """
    requested = _requested.get(name, "reference")
    if requested == "reference" or _ignore_device:
        return requested
    if requested == "cpu" and device.type not in ("cpu", "meta"):
        raise ValueError(f"pw::{name} as cpu runs on the CPU, got {device}")
    if requested != "cpu" and device.type != "cuda":
        raise ValueError(f"pw::{name} as {requested} needs a CUDA device, got {device}")
    return requested


def require(condition: bool, op: str, expected: str, got: object) -> None:
    """Raise ValueError naming the operation, what it expects and what it got."""
    if not condition:
        raise ValueError(f"pw::{op} expects {expected}, got {got}")


def layout(x: Tensor) -> str:
    """Return the shape and strides of a tensor, for an error."""
    return f"shape {tuple(x.shape)}, strides {x.stride()}"


def table() -> str:
    """List every operation, what runs by default on this machine, and what can be requested."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"operations on {device}: the default implementation, then the alternatives", ""]
    for op in sorted(OPS.values(), key=lambda op: op.name):
        default = select(op.name, device)
        lines.append(f"  {op.name:<20} {default:<10} {', '.join(op.alternatives)}".rstrip())
    return "\n".join(lines)
