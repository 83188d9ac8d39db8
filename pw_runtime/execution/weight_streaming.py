# SPDX-License-Identifier: Apache-2.0
"""Providers of a transformer's weights: where they are kept, and how a segment gets one block's.

Resident weights are on the device. Streamed weights are in host memory or in the bundle's files,
and each segment has one slot on the device: while one segment of a block runs, and during the
attention between them, the other segment's slot is filled for its next block. A whole block has one
slot, which is filled between its calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from pw_runtime.checkpoint.loader import is_streamed
from pw_runtime.checkpoint.lora import Lora, merged
from pw_runtime.execution.transformer_segments import (
    BLOCK_PARTS,
    FIRST_BLOCK,
    Segment,
    segment_of_block,
)
from pw_runtime.models import WanDiT
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.types import Precision


class Weights(Protocol):
    """Provider of the weights that a `SegmentedDiT` runs with.

    `block_in` and `block_out` stand for the segments that compute these parts of a block.
    """

    def acquire(self, segment: str, block: int = 0) -> list[Tensor]:
        """Return a segment's weights for a block, in the order of its spec, on the device.

        They stay unchanged until `release`.
        """
        ...

    def release(self, segment: str, block: int, next_block: int) -> None:
        """Allow the weights of `block` to be replaced by those of a later one.

        The segment will run for `next_block` next.

        Call it when all work that reads them has been queued on the device.
        """
        ...

    def close(self) -> None:
        """End the provider; nothing can be acquired afterwards."""
        ...


class ResidentWeights:
    """All weights are on the device."""

    def __init__(self, net: WanDiT, segments: Mapping[str, Segment]) -> None:
        self._net, self._segments = net, segments
        self._stored: dict[str, Tensor] = dict(net.named_parameters())
        self._weights: dict[tuple[str, int], list[Tensor]] = {}

    def acquire(self, segment: str, block: int = 0) -> list[Tensor]:
        """Return the weights; see `Weights.acquire`."""
        if (segment, block) not in self._weights:
            names = names_in_block(
                self._segments[segment_of_block(self._net, segment, block)], block
            )
            self._weights[segment, block] = [self._stored[name] for name in names]
        return self._weights[segment, block]

    def release(self, segment: str, block: int, next_block: int) -> None:
        """Do nothing: no weight moves."""

    def close(self) -> None:
        """Do nothing: there is no thread to end."""


class StreamedWeights:
    """Weights of blocks are kept off the device and copied to it just before they are needed.

    A thread reads and converts them, so that neither the disk nor the copy holds up the
    computation. `close` ends it.
    """

    def __init__(
        self,
        net: WanDiT,
        segments: Mapping[str, Segment],
        precision: Precision,
        device: torch.device,
        loras: Iterable[Lora] = (),
    ) -> None:
        """Stream the blocks of a network whose weights are in host memory, in any float dtype.

        `loras` are merged into each weight whenever it is copied: where the weights are mapped.
        """
        self._net, self._stored = net, dict(net.named_parameters())
        self._loras = tuple(loras)
        self._segments, self._precision, self._device = dict(segments), precision, device
        self._thread = ThreadPoolExecutor(1, "weights")
        self._slots: dict[str, _Slot] = {}
        try:
            self._make_slots()
        except BaseException:
            self.close()  # or copies go on into memory that the next attempt may get
            raise

    def acquire(self, segment: str, block: int = 0) -> list[Tensor]:
        """Wait for a block's weights and return them; see `Weights.acquire`."""
        entry = self._slot(segment, block)
        if entry is None:
            names = names_in_block(self._segments[segment], block)
            return [self._on_device(name) for name in names]
        name, slot = entry
        slot.filling.exception()  # only waits: what failed is done again
        if slot.block != block:  # after an error, or where another block was prefetched
            self._thread.submit(self._fill, name, block).result()
        slot.wait()
        return slot.tensors

    def release(self, segment: str, block: int, next_block: int) -> None:
        """Begin to fill the slot of the next block; see `Weights.release`."""
        entry, following = self._slot(segment, block), self._slot(segment, next_block)
        if entry is None or following is None:
            return
        entry[1].release()
        name, slot = following
        slot.filling = self._thread.submit(self._fill, name, next_block)

    def close(self) -> None:
        """End the thread and the copies; nothing can be acquired afterwards."""
        self._thread.shutdown(cancel_futures=True)
        for slot in self._slots.values():
            slot.finish()

    def _make_slots(self) -> None:
        """Make a slot for each kind of block, and begin to fill it with the first such block."""
        for part in BLOCK_PARTS:
            for block in range(self._net.config.num_layers):
                name = segment_of_block(self._net, part, block)
                if name in self._slots or name not in self._segments:
                    continue
                names = names_in_block(self._segments[name], block)
                slot = _Slot([self._converted(key) for key in names], self._device)
                self._slots[name] = slot
                slot.filling = self._thread.submit(self._fill, name, block)

    def _slot(self, segment: str, block: int) -> tuple[str, _Slot] | None:
        """Find the slot for a segment's block; segments with the same weights share one."""
        weights = self._segments[segment_of_block(self._net, segment, block)].weights
        if not weights or not weights[0].startswith(FIRST_BLOCK):
            return None
        for name, slot in self._slots.items():
            if self._segments[name].weights == weights:
                return name, slot
        return None

    def _fill(self, segment: str, block: int) -> None:
        names = names_in_block(self._segments[segment], block)
        with torch.inference_mode():
            self._slots[segment].fill(block, [self._converted(name) for name in names])

    def _on_device(self, name: str) -> Tensor:
        """Return a weight on the device; weights outside the blocks are there and converted."""
        return self._converted(name).to(self._device) if is_streamed(name) else self._stored[name]

    def _converted(self, name: str) -> Tensor:
        weight = merged(self._loras, name, self._stored[name])
        return store_dit_weight(name, weight, self._precision)


class _Slot:
    """Memory on the device for one segment's weights, of one block at a time."""

    filling: Future[None]

    def __init__(self, like: list[Tensor], device: torch.device) -> None:
        self.block: int | None = None
        self.tensors = [torch.empty_like(weight, device=device) for weight in like]
        self._staged: list[Tensor] = []
        if device.type == "cuda":
            # Only copies from pinned memory overlap with computation, and pinning all weights would
            # take up to half as much again: PyTorch rounds pinned blocks up to powers of two.
            self._staged = [torch.empty_like(weight, pin_memory=True) for weight in like]
            self._stream = torch.cuda.Stream(device)
            self._filled, self._free = torch.cuda.Event(), torch.cuda.Event()
            self.release()  # work queued earlier may still read this memory

    def fill(self, block: int, weights: list[Tensor]) -> None:
        """Copy weights here, after all work that was queued before `release`."""
        self.block = None  # until all of them are here: an error may come in between
        if self._staged:
            self._copy_staged(weights)
        else:
            for target, weight in zip(self.tensors, weights, strict=True):
                target.copy_(weight)
        self.block = block

    def _copy_staged(self, weights: list[Tensor]) -> None:
        self._filled.synchronize()  # the previous copy out of the pinned memory
        for staged, weight in zip(self._staged, weights, strict=True):
            staged.copy_(weight)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free)
            for target, staged in zip(self.tensors, self._staged, strict=True):
                target.copy_(staged, non_blocking=True)
            self._filled.record(self._stream)

    def finish(self) -> None:
        """Wait for the last copy: the allocator may reuse this memory on another stream."""
        if self._staged:
            self._stream.synchronize()

    def wait(self) -> None:
        """Make work that is queued from now on wait for the weights."""
        if self._staged:
            torch.cuda.current_stream(self.tensors[0].device).wait_event(self._filled)

    def release(self) -> None:
        """Mark the point after which queued work no longer reads these weights."""
        if self._staged:
            self._free.record(torch.cuda.current_stream(self.tensors[0].device))


def names_in_block(segment: Segment, block: int) -> list[str]:
    """Return the names of a segment's weights in the network, for a block."""
    return [name.replace(FIRST_BLOCK, f"blocks.{block}.", 1) for name in segment.weights]
