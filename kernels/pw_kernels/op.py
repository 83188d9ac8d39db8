# SPDX-License-Identifier: Apache-2.0
"""The one place that decides which implementation of an operation runs.

Every operation has a plain PyTorch `reference`: what a CPU runs, what export traces, and the
oracle of everything faster. Some also have a Triton kernel behind a torch operator
(`torch.ops.pw.<name>`); attention has others besides. A public function checks its input, asks
`chosen`, and calls one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

Implementation = Literal["reference", "triton", "gluon", "cudnn", "flash", "flash-attn"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operation takes at least: floating-point operations and bytes moved."""

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Op:
    """An operation: its name, its oracle, its cost as a function of the same arguments."""

    name: str
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    launch: Callable[..., Any] | None = None  # of the Triton kernel behind torch.ops.pw.<name>
    libraries: tuple[Implementation, ...] = ()  # what else there is besides the reference

    @property
    def others(self) -> tuple[Implementation, ...]:
        """The implementations besides the reference."""
        kernel: tuple[Implementation, ...] = ("triton",) if self.launch else ()
        return kernel + self.libraries


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that runs, and why."""

    implementation: Implementation
    reason: str


OPS: dict[str, Op] = {}
_wanted: dict[str, Implementation] = {}  # operation -> what was asked for; a global: dynamo guards


_anywhere = (
    False  # whether kernels are launched for tensors of any device, see pw_kernels.launching
)


def register(op: Op) -> Op:
    """Add an operation to OPS."""
    assert op.name not in OPS, f"{op.name} is registered twice"
    OPS[op.name] = op
    return op


@contextmanager
def using(implementation: Implementation, **by_op: Implementation) -> Iterator[None]:
    """Run the block with this implementation of every operation that has it (process-wide).

    `by_op` says otherwise for single operations: using("triton", attention="cudnn").

    Raises ValueError for an operation there is not, or that has no such implementation.
    """
    global _wanted
    for name, one in by_op.items():
        if name not in OPS:
            raise ValueError(f"no operation {name} among {', '.join(sorted(OPS))}")
        have = ("reference", *OPS[name].others)
        require(one in have, name, f"one of {', '.join(have)}", one)
    general = {op.name: implementation for op in OPS.values() if implementation in op.others}
    before, _wanted = _wanted, general | by_op
    try:
        yield
    finally:
        _wanted = before


@contextmanager
def on_any_device() -> Iterator[None]:
    """Let the block choose kernels where nothing could run them: to record or interpret them."""
    global _anywhere
    before, _anywhere = _anywhere, True
    try:
        yield
    finally:
        _anywhere = before


def chosen(name: str, device: torch.device) -> Choice:
    """What runs of operation `name` for tensors on `device`, and why.

    Raises ValueError where an implementation was asked for that `device` cannot run.
    """
    if name not in OPS or "triton" not in OPS[name].others:
        return Choice("reference", "the only one")
    wanted = _wanted.get(name, "reference")
    if wanted == "reference":
        return Choice("reference", "the default; kernels are asked for with --kernels triton")
    if device.type != "cuda" and not _anywhere:
        raise ValueError(f"pw::{name} as {wanted} needs a CUDA device, got {device}")
    return Choice(wanted, "asked for")


def require(condition: bool, op: str, what: str, got: object) -> None:
    """Raise ValueError naming the operation, what it wants and what it got."""
    if not condition:
        raise ValueError(f"pw::{op} wants {what}, got {got}")


def table() -> str:
    """Every operation, its implementations, and what runs on this machine unless asked."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"operations on {device}: the one that runs unless asked, then what can be asked", ""]
    for op in sorted(OPS.values(), key=lambda op: op.name):
        choice = chosen(op.name, device)
        lines.append(f"  {op.name:<20} {choice.implementation:<10} {', '.join(op.others)}".rstrip())
    return "\n".join(lines)
