# SPDX-License-Identifier: Apache-2.0
"""Weights divided among ranks: each keeps its share of every block, and all gather the next one.

The weights of a segment lie one after the other in one run of bytes, which is cut into equal
shares. While a block runs, the next one is gathered into the slot of its segment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pw_runtime.checkpoint.loader import is_streamed
from pw_runtime.checkpoint.lora import Lora, merged
from pw_runtime.execution.transformer_segments import (
    BLOCK_PARTS,
    FIRST_BLOCK,
    Segment,
)
from pw_runtime.execution.weight_streaming import names_in_block
from pw_runtime.models import WanDiT
from pw_runtime.models.precision import store_dit_weight
from pw_runtime.system.ranks import Group, Pending, Ranks
from pw_runtime.types import Precision

ALIGNMENT = 256  # bytes: what PyTorch's allocators give, so that kernels see what they always see


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Place of each weight of a segment in a run of bytes, and how long a rank's share is."""

    weights: tuple[tuple[int, torch.dtype, torch.Size], ...]  # first byte, dtype, shape
    share: int  # bytes

    def views(self, run: Tensor) -> list[Tensor]:
        """Return the weights in a run, [ranks * share] uint8."""
        views = []
        for start, dtype, shape in self.weights:
            size = shape.numel() * dtype.itemsize
            views.append(run[start : start + size].view(dtype).view(shape))
        return views


def packed_layout(weights: list[Tensor], ranks: int) -> PackedLayout:
    """Lay out weights, of which only dtypes and shapes matter, for a number of ranks."""
    entries, end = [], 0
    for weight in weights:
        entries.append((end, weight.dtype, weight.shape))
        end += -(-weight.numel() * weight.element_size() // ALIGNMENT) * ALIGNMENT
    share = -(-end // (ranks * ALIGNMENT)) * ALIGNMENT
    return PackedLayout(tuple(entries), share)


class GatheredWeights:
    """Each rank keeps a share of every block's weights; implements `weight_streaming.Weights`."""

    def __init__(
        self,
        net: WanDiT,
        segments: Mapping[str, Segment],
        precision: Precision,
        ranks: Ranks,
        group: Group,
        loras: Iterable[Lora] = (),
    ) -> None:
        """Keep this rank's share of the blocks; nothing is gathered yet.

        Args:
            net: its blocks' weights are in the bundle's files, all others on the device.
            segments: by name.
            precision: of the weights.
            ranks: this process among all.
            group: the ranks that divide the weights.
            loras: merged into the weights before they are divided.
        """
        self._loras = tuple(loras)
        self._stored, self._segments = dict(net.named_parameters()), dict(segments)
        self._precision, self._ranks, self._group = precision, ranks, group
        self._layouts: dict[str, PackedLayout] = {}
        self._shares: dict[tuple[str, int], Tensor] = {}  # [share] uint8
        self._slots: dict[str, _Slot] = {}
        for key, segment in self._divided().items():
            like = [
                store_dit_weight(
                    name, torch.empty_like(self._stored[name], device="meta"), precision
                )
                for name in names_in_block(segment, 0)
            ]
            layout = self._layouts[key] = packed_layout(like, group.size)
            for block in range(net.config.num_layers):
                self._shares[key, block] = self._share_of(names_in_block(segment, block), layout)
            if segment.name in BLOCK_PARTS:
                self._slots[key] = self._slot(key)

    def acquire(self, segment: str, block: int = 0) -> list[Tensor]:
        """Wait for a block's weights and return them; see `Weights.acquire`."""
        key = _key(self._segments[segment])
        if key is None:
            return [self._stored[name] for name in self._segments[segment].weights]
        # What runs once per clip needs no memory between its runs.
        slot = self._slots.get(key) or self._slot(key)
        if slot.block != block:
            self._begin(key, block, slot)
        slot.pending.wait()
        return slot.weights

    def release(self, segment: str, block: int, next_block: int) -> None:
        """Begin to gather the next block; see `Weights.release`."""
        key = _key(self._segments[segment])
        if key is not None and key in self._slots and self._slots[key].block != next_block:
            self._begin(key, next_block)

    def close(self) -> None:
        """Wait for what is under way, where the ranks still live."""
        if not self._ranks.failed:
            for slot in self._slots.values():
                slot.pending.wait()

    def _divided(self) -> dict[str, Segment]:
        """Return one segment for each set of weights that blocks have of their own."""
        found: dict[str, Segment] = {}
        for segment in self._segments.values():
            key = _key(segment)
            if key is not None and all(is_streamed(name) for name in names_in_block(segment, 0)):
                found.setdefault(key, segment)
        return found

    def _slot(self, key: str) -> _Slot:
        layout = self._layouts[key]
        size = layout.share * self._group.size
        run = torch.empty(size, dtype=torch.uint8, device=self._ranks.device)
        return _Slot(run, layout.views(run))

    def _begin(self, key: str, block: int, slot: _Slot | None = None) -> None:
        slot = slot or self._slots[key]
        slot.pending.wait()
        slot.block = block
        share = self._shares[key, block]
        slot.pending = self._ranks.gather(self._group, slot.run, share, "weights of a block")

    def _share_of(self, names: list[str], layout: PackedLayout) -> Tensor:
        """Return this rank's share of a block, [share] uint8: only its bytes are read."""
        first = layout.share * self._group.rank
        last = first + layout.share
        share = torch.zeros(layout.share, dtype=torch.uint8)
        for name, (start, dtype, shape) in zip(names, layout.weights, strict=True):
            size = shape.numel() * dtype.itemsize
            begin, end = max(start, first), min(start + size, last)
            if begin < end:
                weight = merged(self._loras, name, self._stored[name])
                weight = store_dit_weight(name, weight, self._precision)
                data = weight.contiguous().view(-1).view(torch.uint8)
                share[begin - first : end - first] = data[begin - start : end - start]
        return share.to(self._ranks.device)


class _Slot:
    """Memory for one segment's weights, of one block at a time."""

    def __init__(self, run: Tensor, weights: list[Tensor]) -> None:
        self.run, self.weights = run, weights
        self.block: int | None = None
        self.pending = Pending()


def _key(segment: Segment) -> str | None:
    """Return what segments with the same weights of a block have in common; None without any."""
    if not segment.weights or not segment.weights[0].startswith(FIRST_BLOCK):
        return None
    return segment.weights[0]
