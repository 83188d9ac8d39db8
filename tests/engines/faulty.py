# SPDX-License-Identifier: Apache-2.0
"""An engine that fails when it is told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pw_engines.eager import EagerEngine
from pw_engines.engine import EngineError, SegmentFunction
from pw_engines.spec import Backend, EngineSpec

Fault = Literal["error", "out of memory", "nan"]


class FaultyEngine:
    """The eager engine, with one fault at one call; it may pass for any backend.

    "error": EngineError. "out of memory": torch.OutOfMemoryError. "nan": it ends well and its
    first output has a NaN. `entered` is called with the number of every call, from 1, before
    anything is computed: a test can wait there for another thread, or count.
    """

    def __init__(
        self,
        spec: EngineSpec,
        segment: SegmentFunction,
        *,
        fault: Fault | None = None,
        at: int = 1,
        backend: Backend = "eager",
        padded: bool = False,
        entered: Callable[[int], None] = lambda call: None,
    ) -> None:
        self.spec = spec
        self.backend = backend
        self.padded = padded
        self.calls = 0
        self._inner = EagerEngine(spec, segment)
        self._fault = fault
        self._at = at
        self._entered = entered

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Compute, or fail."""
        self.calls += 1
        self._entered(self.calls)
        fault = self._fault if self.calls == self._at else None
        if fault == "error":
            raise EngineError(f"{self.spec.segment} failed, as it was told to")
        if fault == "out of memory":
            raise torch.OutOfMemoryError(f"{self.spec.segment} ran out of memory, as told")
        self._inner.run(inputs, outputs)
        if fault == "nan":
            outputs[0].view(-1)[0] = float("nan")
