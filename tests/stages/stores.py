# SPDX-License-Identifier: Apache-2.0
"""A store of tiles for decodes whose tensors have no bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Nowhere:
    """Keeps nothing."""

    finished = 0

    def open(self, shapes: Sequence[tuple[int, ...]], frames: int) -> None:
        self.shapes = shapes

    def write(self, pixels: torch.Tensor) -> None:
        pass

    def finish(self) -> None:
        pass

    def read(self, tile: int, start: int, count: int) -> torch.Tensor:
        return torch.empty((count, *self.shapes[tile]), dtype=torch.uint8)
