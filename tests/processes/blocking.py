# SPDX-License-Identifier: Apache-2.0
"""A network whose build never ends, for a worker process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pw_runtime.execution.compilers import Compiler
from pw_runtime.execution.transformer_segments import Segment


@dataclass(frozen=True)
class BlockingSource:
    """Says through a named pipe that it is being built, and holds the pipe open."""

    pipe: str

    def segments(self, compiler: Compiler, device: torch.device | None) -> Mapping[str, Segment]:
        """Say so and wait."""
        with open(self.pipe, "w", encoding="utf-8") as pipe:
            print("running", file=pipe, flush=True)
            threading.Event().wait()
        return {}
