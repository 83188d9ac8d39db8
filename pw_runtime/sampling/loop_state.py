# SPDX-License-Identifier: Apache-2.0
"""A denoising loop between two of its steps: all that it needs to go on with the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    """State of the solver, and of what leaves out steps or passes.

    Attributes:
        steps: that are finished.
        tensors: [C, T, H, W] fp32 by name; nothing changes them any more.
        numbers: by name.
    """

    steps: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, float] = field(default_factory=dict)

    def on(self, device: torch.device) -> LoopState:
        """Return the state with its tensors on a device; those that are there are not copied."""
        return replace(self, tensors={name: x.to(device) for name, x in self.tensors.items()})

    def extended(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> LoopState:
        """Return the state with more in it."""
        both = {**self.tensors, **tensors}
        return replace(self, tensors=both, numbers={**self.numbers, **numbers})


class StepLog(Protocol):
    """Keeps the state of a denoising loop, for a run that goes on where another was ended."""

    def begin(self) -> LoopState | None:
        """Return the state to go on from; None: the loop begins with its noise."""
        ...

    def keep(self, state: LoopState) -> None:
        """Take the state between two steps. Raises Stopped where the run was asked to stop."""
        ...


class NoLog:
    """A log of a loop that nothing ends and nothing follows."""

    def begin(self) -> LoopState | None:
        """Return None: the loop begins with its noise."""
        return None

    def keep(self, state: LoopState) -> None:
        """Do nothing."""
