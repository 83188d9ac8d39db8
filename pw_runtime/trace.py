# SPDX-License-Identifier: Apache-2.0
"""Where the seconds of a clip went."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Stopwatch:
    """Adds up wall-clock seconds by stage; waits for the device before reading the clock.

    A stage inside another one is not counted to the outer one.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._inside = 0.0  # seconds of the stages that the current one contains

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time spent inside the block, also when it fails."""
        before, self._inside = self._inside, 0.0
        start = self._now()
        try:
            yield
        finally:
            total = self._now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + total - self._inside
            self._inside = before + total

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Count the time spent making items, not the time spent with them."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
            del item  # while the next one is made, this one must be free

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
