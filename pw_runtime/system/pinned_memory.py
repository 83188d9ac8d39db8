# SPDX-License-Identifier: Apache-2.0
"""Host memory that a GPU copies to and from at full speed, for many tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK = 2**28
"""Bytes of a pinned block. PyTorch rounds pinned memory up to a power of two: this is one."""
_ALIGNMENT = 256


class PinnedMemory:
    """Hands out pinned memory in parts of large blocks; all of it is freed together."""

    def __init__(self) -> None:
        self._blocks: list[tuple[Tensor, int]] = []  # bytes, and how many of them are in use

    def like(self, x: Tensor) -> Tensor:
        """Return memory for a tensor of x's shape, dtype and order of dimensions."""
        size = _aligned(x.numel() * x.element_size())
        index = _place(size, [len(block) - used for block, used in self._blocks])
        if index == len(self._blocks):
            block = torch.empty(max(BLOCK, size), dtype=torch.uint8, pin_memory=True)
            self._blocks.append((block, 0))
        block, used = self._blocks[index]
        self._blocks[index] = (block, used + size)
        part = block[used : used + size].view(x.dtype)
        return part.as_strided(x.shape, torch.empty_like(x, device="meta").stride())


def pinned_bytes(sizes: Iterable[int]) -> int:
    """Return the bytes that PinnedMemory takes for tensors of these sizes, in this order."""
    blocks, free = 0, list[int]()
    for size in map(_aligned, sizes):
        index = _place(size, free)
        if index == len(free):
            free.append(max(BLOCK, size))
            blocks += 1 << (max(BLOCK, size) - 1).bit_length()
        free[index] -= size
    return blocks


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _place(size: int, free: list[int]) -> int:
    """Return the first block with that much room, or the number of blocks."""
    return next((index for index, room in enumerate(free) if room >= size), len(free))
