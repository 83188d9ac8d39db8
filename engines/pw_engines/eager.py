# SPDX-License-Identifier: Apache-2.0
"""Run the segment itself as an engine: the oracle of the others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pw_engines.engine import SegmentFunction
from pw_engines.spec import Backend, EngineSpec


class EagerEngine:
    """An engine that calls the segment; nothing is compiled."""

    backend: Backend = "eager"
    padded = False
    granularity = 1
    scratch = 0

    def __init__(self, spec: EngineSpec, segment: SegmentFunction) -> None:
        self.spec = spec
        self._segment = segment

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Compute `outputs`. Raises ValueError for tensors that the spec does not allow."""
        self.spec.check_outputs(outputs, self.spec.sizes(inputs, smallest=1))
        for target, result in zip(outputs, self._segment(*inputs), strict=True):
            target.copy_(result)
