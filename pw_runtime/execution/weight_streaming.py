# SPDX-License-Identifier: Apache-2.0
"""Where a transformer's weights lie, and how a segment gets those of one block.

Resident weights lie on the device. Streamed ones lie in host memory or in the bundle's files, and
each segment has one place on the device: while one segment of a block runs, and during the
attention between them, the other one's place is filled with what comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from pw_runtime.checkpoint.loader import is_streamed
from pw_runtime.execution.transformer_segments import FIRST_BLOCK, Segment
from pw_runtime.models import WanDiT
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.types import Precision

STREAMED = ("block_in", "block_out")  # that every step runs once per block


class Weights(Protocol):
    """What a `SegmentedDiT` runs on."""

    def take(self, segment: str, block: int = 0) -> list[Tensor]:
        """A segment's weights for a block, in the order of its spec, on the device.

        They stay as they are until `done`.
        """
        ...

    def done(self, segment: str, following: int) -> None:
        """All work on these has been given to the device: those of block `following` may come."""
        ...

    def close(self) -> None:
        """Nothing will be taken any more."""
        ...


class ResidentWeights:
    """All weights lie on the device."""

    def __init__(self, net: WanDiT, segments: Mapping[str, Segment]) -> None:
        stored: dict[str, Tensor] = dict(net.named_parameters())
        layers = range(net.config.num_layers)
        self._weights = {
            name: [[stored[key] for key in of_block(one, block)] for block in layers]
            for name, one in segments.items()
        }

    def take(self, segment: str, block: int = 0) -> list[Tensor]:
        """As `Weights.take`."""
        return self._weights[segment][block]

    def done(self, segment: str, following: int) -> None:
        """Nothing has to move."""

    def close(self) -> None:
        """Nothing has to end."""


class StreamedWeights:
    """Weights of blocks lie elsewhere and come to the device when they are needed.

    A thread of its own reads and converts them, so that neither the disk nor the copy holds up
    the computation. `close` ends it.
    """

    def __init__(
        self,
        net: WanDiT,
        segments: Mapping[str, Segment],
        precision: Precision,
        device: torch.device,
    ) -> None:
        """Take a network whose blocks' weights lie in host memory, in any float dtype."""
        self._stored = dict(net.named_parameters())
        self._segments, self._precision, self._device = dict(segments), precision, device
        self._thread = ThreadPoolExecutor(1, "weights")
        self._places = {
            name: _Place([self._converted(key) for key in of_block(segments[name], 0)], device)
            for name in STREAMED
        }
        for name, place in self._places.items():
            place.filling = self._thread.submit(self._fill, name, 0)

    def take(self, segment: str, block: int = 0) -> list[Tensor]:
        """As `Weights.take`."""
        place = self._place(segment)
        if place is None:
            names = of_block(self._segments[segment], block)
            return [self._here(name) for name in names]
        name, held = place
        held.filling.result()
        if held.block != block:  # after an error, or where another one was foretold
            self._thread.submit(self._fill, name, block).result()
        held.wait()
        return held.tensors

    def done(self, segment: str, following: int) -> None:
        """As `Weights.done`."""
        place = self._place(segment)
        if place is None:
            return
        name, held = place
        held.release()
        held.filling = self._thread.submit(self._fill, name, following)

    def close(self) -> None:
        """End the thread and the copies; nothing can be taken any more."""
        self._thread.shutdown(cancel_futures=True)
        for place in self._places.values():
            place.finish()

    def _place(self, segment: str) -> tuple[str, _Place] | None:
        """The place of a segment; segments of the same weights share one."""
        if not self._segments[segment].weights[0].startswith(FIRST_BLOCK):
            return None
        weights = self._segments[segment].weights
        for name, place in self._places.items():
            if self._segments[name].weights == weights:
                return name, place
        return None

    def _fill(self, segment: str, block: int) -> None:
        names = of_block(self._segments[segment], block)
        with torch.inference_mode():
            self._places[segment].fill(block, [self._converted(name) for name in names])

    def _here(self, name: str) -> Tensor:
        """A weight on the device; those of no block are there and converted already."""
        return self._converted(name).to(self._device) if is_streamed(name) else self._stored[name]

    def _converted(self, name: str) -> Tensor:
        return store_dit_weight(name, self._stored[name], self._precision)


class _Place:
    """Memory on the device for one segment's weights, whichever block's."""

    filling: Future[None]

    def __init__(self, like: list[Tensor], device: torch.device) -> None:
        self.block: int | None = None
        self.tensors = [torch.empty_like(one, device=device) for one in like]
        self._staged: list[Tensor] = []
        if device.type == "cuda":
            # Copies run beside the computation only from pinned memory, and pinning all weights
            # would take up to half more than they have: PyTorch pins powers of two.
            self._staged = [torch.empty_like(one, pin_memory=True) for one in like]
            self._stream = torch.cuda.Stream(device)
            self._filled, self._free = torch.cuda.Event(), torch.cuda.Event()
            self.release()  # this memory may be what work given before still reads

    def fill(self, block: int, weights: list[Tensor]) -> None:
        """Bring weights here, after all work that was given to the device before `release`."""
        self.block = None  # until all of them are here: an error may come in between
        if self._staged:
            self._copy_staged(weights)
        else:
            for target, one in zip(self.tensors, weights, strict=True):
                target.copy_(one)
        self.block = block

    def _copy_staged(self, weights: list[Tensor]) -> None:
        self._filled.synchronize()  # the copy out of the pinned memory before
        for staged, one in zip(self._staged, weights, strict=True):
            staged.copy_(one)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free)
            for target, staged in zip(self.tensors, self._staged, strict=True):
                target.copy_(staged, non_blocking=True)
            self._filled.record(self._stream)

    def finish(self) -> None:
        """Wait for the last copy: this memory goes back to those who do not know of it."""
        if self._staged:
            self._stream.synchronize()

    def wait(self) -> None:
        """Let the device begin nothing more before the weights are here."""
        if self._staged:
            torch.cuda.current_stream(self.tensors[0].device).wait_event(self._filled)

    def release(self) -> None:
        """What is given to the device from now on does not read these weights."""
        if self._staged:
            self._free.record(torch.cuda.current_stream(self.tensors[0].device))


def of_block(segment: Segment, block: int) -> list[str]:
    """Names of a segment's weights in the network, for a block."""
    return [name.replace(FIRST_BLOCK, f"blocks.{block}.", 1) for name in segment.weights]
