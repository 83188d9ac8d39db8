# SPDX-License-Identifier: Apache-2.0
"""Writes into parts of a tensor, as ONNX has none: the parts are joined.

The networks make a tensor and fill it part by part, so that nothing is joined in memory. What
PyTorch translates that into, ScatterND over ranges of indices, TensorRT does not take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch


class _Part(NamedTuple):
    """Rows [start, stop) of a tensor along some dimension: those of `value` from `offset` on."""

    start: int
    stop: int
    value: Any
    offset: int
    rows: int  # that `value` has


class Writes:
    """The translations for one model; all sizes must be known."""

    def __init__(self, op: Any) -> None:
        """Take the opset to make operators of."""
        self._op = op
        # Result of a write -> dimension and parts: what a later write covers is then never joined.
        self._parts: dict[Any, tuple[int, list[_Part]]] = {}

    def table(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """PyTorch's operators -> translations, for `torch.onnx.export`."""
        aten = torch.ops.aten
        return {
            aten.slice_scatter.default: _function(self.slice_scatter),
            aten.select_scatter.default: _function(self.select_scatter),
            aten.copy.default: _function(self.copy),
            aten.split.Tensor: _function(self.split),
        }

    def slice_scatter(
        self,
        x: Any,
        src: Any,
        dim: int = 0,
        start: int | None = None,
        end: int | None = None,
        step: int = 1,
    ) -> Any:
        """x with src in place of every `step`-th of its rows from `start` to `end` along `dim`."""
        dim, size, shape = dim % len(x.shape), x.shape[dim], list(x.shape)
        first, last, _ = slice(start, end).indices(size)
        if last <= first:
            return self._op.Identity(x)
        if step == 1:
            return self._written(x, size, src, dim, first, last)
        regular = size % step == 0 and first < step and last == size
        assert regular, "a row in each group of `step` rows"
        groups = self._reshape(x, [*shape[:dim], size // step, step, *shape[dim + 1 :]])
        row = self._op.Unsqueeze(src, self._ints([dim + 1]))
        return self._reshape(self._written(groups, step, row, dim + 1, first, first + 1), shape)

    def select_scatter(self, x: Any, src: Any, dim: int, index: int) -> Any:
        """x with src in place of row `index` along `dim`."""
        index %= x.shape[dim]
        row = self._op.Unsqueeze(src, self._ints([dim % len(x.shape)]))
        return self._written(x, x.shape[dim], row, dim % len(x.shape), index, index + 1)

    def copy(self, x: Any, src: Any, non_blocking: bool = False) -> Any:
        """src in x's shape; both have one dtype."""
        assert x.dtype == src.dtype, "a copy that rounds"
        shape = list(x.shape)
        same = list(src.shape) == shape
        return self._op.Identity(src) if same else self._op.Expand(src, self._ints(shape))

    def split(self, x: Any, size: int, dim: int = 0) -> list[Any]:
        """Parts of x of `size` rows, the last one of what remains."""
        rows = x.shape[dim]
        return [
            self._rows(_Part(low, min(low + size, rows), x, low, rows), dim % len(x.shape))
            for low in range(0, rows, size)
        ]

    def _written(self, x: Any, size: int, src: Any, dim: int, first: int, last: int) -> Any:
        """x, of `size` rows along `dim`, with src in place of those from `first` to `last`."""
        known, parts = self._parts.get(x, (dim, []))
        if known != dim or not parts:
            parts = [_Part(0, size, x, 0, size)]
        left = [part._replace(stop=min(part.stop, first)) for part in parts]
        cut = [max(0, last - part.start) for part in parts]
        right = [
            part._replace(start=part.start + rows, offset=part.offset + rows)
            for part, rows in zip(parts, cut, strict=True)
        ]
        parts = [*left, _Part(first, last, src, 0, last - first), *right]
        parts = [part for part in parts if part.start < part.stop]
        values = [self._rows(part, dim) for part in parts]
        whole = len(values) == 1
        result = self._op.Identity(src) if whole else self._op.Concat(*values, axis=dim)
        self._parts[result] = (dim, parts)
        return result

    def _rows(self, part: _Part, dim: int) -> Any:
        """The rows of `value` that a part has."""
        stop = part.offset + part.stop - part.start
        if (part.offset, stop) == (0, part.rows):
            return part.value
        bounds = [self._ints([at]) for at in (part.offset, stop, dim)]
        return self._op.Slice(part.value, *bounds)

    def _reshape(self, x: Any, shape: Sequence[int]) -> Any:
        return self._op.Reshape(x, self._ints(shape))

    def _ints(self, values: Sequence[int]) -> Any:
        return self._op.Constant(value_ints=list(values))


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as a function: PyTorch writes an attribute on what it registers."""

    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        return method(*args, **options)

    return call
