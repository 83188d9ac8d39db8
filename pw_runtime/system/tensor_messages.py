# SPDX-License-Identifier: Apache-2.0
"""Tensors that go from rank to rank with their strides, on which a convolution's bits depend.

Each is two messages: what it is and how it lies in memory, on the CPU, and then its bytes as they
lie there. The receiver need not know its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pw_runtime.system.ranks import Pending, Ranks

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MARK: Final = 3  # numbers that say what a tensor is
_DIMS: Final = 5
_HEADER: Final = _MARK + 2 + 2 * _DIMS  # mark, dimensions, dtype, sizes, strides

Mark = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Announced:
    """A tensor that a rank sends next; or a mark alone, which has no dimensions.

    Attributes:
        mark: tells what it is.
        size, stride: of each dimension.
        dtype: of its numbers.
    """

    mark: Mark
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32


def send_tensor(ranks: Ranks, x: Tensor | None, mark: Mark, to: int, what: str) -> list[Pending]:
    """Send a tensor of at most five dimensions to a rank, or only a mark.

    Args:
        ranks: this one and the others.
        x: has no gaps in memory; it must not be changed any more.
        mark: tells the receiver what it is.
        to: the receiver.
        what: names the operation, as on the receiver.

    Raises:
        RankFailed: a rank died.
        ValueError: x has gaps.
    """
    header = torch.zeros(_HEADER, dtype=torch.int64)
    header[:_MARK] = torch.tensor(mark)
    if x is None:
        return [ranks.send(header, to, f"size of {what}")]
    if not _dense(tuple(x.shape), x.stride()):
        raise ValueError(f"{what}: a tensor with gaps: {tuple(x.shape)}, strides {x.stride()}")
    blank = (0,) * (_DIMS - x.dim())
    layout = (x.dim(), _DTYPES.index(x.dtype), *x.shape, *blank, *x.stride(), *blank)
    header[_MARK:] = torch.tensor(layout)
    data = x.as_strided((x.numel(),), (1,)).view(torch.uint8)
    return [ranks.send(header, to, f"size of {what}"), ranks.send(data, to, what)]


def receive_mark(ranks: Ranks, of: int, what: str) -> Announced:
    """Receive the first message of `send_tensor`; `receive_tensor` must be next.

    Raises:
        RankFailed: a rank died.
        ValueError: what arrives is not the layout of a tensor.
    """
    header = torch.zeros(_HEADER, dtype=torch.int64)
    ranks.receive(header, of, f"size of {what}").wait()
    one, two, three, dims, code, *numbers = header.tolist()
    if dims == 0:
        return Announced((one, two, three))
    size, stride = tuple(numbers[:dims]), tuple(numbers[_DIMS : _DIMS + dims])
    if not (0 < dims <= _DIMS and 0 <= code < len(_DTYPES)) or not _dense(size, stride):
        text = f"{dims} dimensions, dtype {code}, sizes {size}, strides {stride}"
        raise ValueError(f"{what} of rank {of}: expected the layout of a tensor, got {text}")
    return Announced((one, two, three), size, stride, _DTYPES[code])


def receive_tensor(ranks: Ranks, announced: Announced, of: int, what: str) -> Tensor | None:
    """Receive an announced tensor, laid out as it is there; None for a mark alone.

    Raises:
        torch.OutOfMemoryError: its bytes are still to be received.
        RankFailed: a rank died.
    """
    if not announced.size:
        return None
    size, stride = announced.size, announced.stride
    x = torch.empty_strided(size, stride, dtype=announced.dtype, device=ranks.device)
    ranks.receive(x.as_strided((x.numel(),), (1,)).view(torch.uint8), of, what).wait()
    return x


def _dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Tell whether numbers of these sizes fill their memory, each place once."""
    place = 1
    for step, count in sorted(zip(stride, size, strict=True)):
        if count < 1 or (count > 1 and step != place):
            return False
        place *= count
    return True
