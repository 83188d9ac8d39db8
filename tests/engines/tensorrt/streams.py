# SPDX-License-Identifier: Apache-2.0
"""CUDA streams on the CPU: what is enqueued is done when another stream waits for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class Stream:
    """Stands for torch.cuda.Stream."""

    _handles = itertools.count(1000)
    _all: dict[int, Stream] = {}  # noqa: RUF012

    def __init__(self, device: Any = None) -> None:
        self.cuda_stream = next(self._handles)
        self._all[self.cuda_stream] = self
        self._work: list[Callable[[], None]] = []
        self._waited = False

    @classmethod
    def of(cls, handle: int) -> Stream:
        """The stream behind a handle."""
        assert handle in cls._all, "the default stream, or no stream at all"
        return cls._all[handle]

    def enqueue(self, work: Callable[[], None]) -> None:
        """Add work. The inputs must be there: the stream must have waited for their maker."""
        assert self._waited, "the stream did not wait for the caller's"
        self._waited = False
        self._work.append(work)

    def wait_stream(self, other: Stream) -> None:
        """Do the work of the other, so that what follows here comes after it."""
        self._waited = True
        other.synchronize()

    def synchronize(self) -> None:
        """Do all work."""
        while self._work:
            self._work.pop(0)()


class Cuda:
    """The parts of torch.cuda that our code uses, on the CPU."""

    def __init__(self) -> None:
        self.current = Stream()
        self.capturing = False

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put this into torch.cuda for the time of a test."""
        properties = SimpleNamespace(name="Simulated H200", major=9, minor=0)
        for name, what in {
            "Stream": Stream,
            "current_stream": lambda: self.current,
            "device": self.device,
            "get_device_properties": lambda device: properties,
            "is_available": lambda: True,
            "is_current_stream_capturing": lambda: self.capturing,
        }.items():
            monkeypatch.setattr(torch.cuda, name, what)
