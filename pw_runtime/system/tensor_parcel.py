# SPDX-License-Identifier: Apache-2.0
"""Tensors that go from rank to rank with their strides, on which a convolution's bits depend.

A parcel is two messages: a table of sizes, strides and dtypes on the CPU, then one run of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pw_runtime.system.ranks import Pending, Ranks

_ALIGNMENT: Final = 256  # bytes, as allocators align: vectorized loads see no difference
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DIMS: Final = 5
_COLUMNS: Final = 2 + 2 * _DIMS  # dimensions, dtype, sizes, strides; all zero where there is none


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a tensor lies in memory, and where in the bytes of a parcel."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int  # byte
    stop: int

    def view(self, data: Tensor) -> Tensor:
        """Return the tensor that lies in the bytes of a parcel."""
        return data[self.start : self.stop].view(self.dtype).as_strided(self.size, self.stride)


@dataclass(frozen=True, slots=True)
class Parcel:
    """Some tensors, by number, copied together.

    Attributes:
        table: [1 + most, columns] int64 on the CPU: what the parcel is, then a row per number.
        data: [bytes] uint8 on the tensors' device.
    """

    table: Tensor
    data: Tensor

    @classmethod
    def of(
        cls, tensors: Mapping[int, Tensor], most: int, mark: tuple[int, int], device: torch.device
    ) -> Parcel:
        """Copy tensors that have no gaps in memory.

        Args:
            tensors: by number, from 0 on, each of at most five dimensions.
            most: numbers that there may be.
            mark: what the parcel is: the receiver expects the same.
            device: of the tensors.
        """
        table = torch.zeros(1 + most, _COLUMNS, dtype=torch.int64)
        table[0, :2] = torch.tensor(mark)
        for number, x in tensors.items():
            blank = (0,) * (_DIMS - x.dim())
            row = (x.dim(), _DTYPES.index(x.dtype), *x.shape, *blank, *x.stride(), *blank)
            table[1 + number] = torch.tensor(row)
        layouts = dict(_layouts(table))
        data = torch.empty(_bytes(layouts), dtype=torch.uint8, device=device)
        for number, layout in layouts.items():
            layout.view(data).copy_(tensors[number])
        return cls(table, data)

    def send(self, ranks: Ranks, to: int, what: str) -> list[Pending]:
        """Send both messages to a rank; `what` names them."""
        sent = [ranks.send(self.table, to, f"sizes of {what}")]
        if len(self.data):
            sent.append(ranks.send(self.data, to, what))
        return sent


def receive_parcel(
    ranks: Ranks, of: int, most: int, mark: tuple[int, int], what: str
) -> dict[int, Tensor]:
    """Receive the tensors of a parcel, laid out as they were on the rank that sent them.

    Raises RankFailed, and ValueError where the parcel is not the expected one.
    """
    table = torch.zeros(1 + most, _COLUMNS, dtype=torch.int64)
    ranks.receive(table, of, f"sizes of {what}").wait()
    if (got := tuple(table[0, :2].tolist())) != mark:
        raise ValueError(f"{what} of rank {of}: expected {mark}, got {got}")
    try:
        layouts = dict(_layouts(table))
    except ValueError as error:
        raise ValueError(f"{what} of rank {of}: {error}") from error
    data = torch.empty(_bytes(layouts), dtype=torch.uint8, device=ranks.device)
    if len(data):
        ranks.receive(data, of, what).wait()
    return {number: layout.view(data) for number, layout in layouts.items()}


def _layouts(table: Tensor) -> Iterator[tuple[int, _Layout]]:
    """Yield each number and its layout. Raises ValueError for one that no tensor has."""
    start = 0
    for number, row in enumerate(table[1:].tolist()):
        dims, code, numbers = row[0], row[1], row[2:]
        if dims == 0:
            continue
        size, stride = tuple(numbers[:dims]), tuple(numbers[_DIMS : _DIMS + dims])
        if not (0 < dims <= _DIMS and 0 <= code < len(_DTYPES)) or min(size) < 1:
            raise ValueError(f"tensor {number} of {dims} dimensions, dtype {code}, sizes {size}")
        if not _dense(size, stride):
            raise ValueError(f"tensor {number} has gaps: sizes {size}, strides {stride}")
        stop = start + math.prod(size) * _DTYPES[code].itemsize
        yield number, _Layout(_DTYPES[code], size, stride, start, stop)
        start = -(-stop // _ALIGNMENT) * _ALIGNMENT


def _dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Tell whether a tensor's numbers fill its memory, each place once."""
    place = 1
    for step, count in sorted(zip(stride, size, strict=True)):
        if count > 1 and step != place:
            return False
        place *= count
    return True


def _bytes(layouts: Mapping[int, _Layout]) -> int:
    return max((layout.stop for layout in layouts.values()), default=0)
