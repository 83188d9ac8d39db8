# SPDX-License-Identifier: Apache-2.0
"""Rewrite writes into slices of a tensor as concatenations, for ONNX.

The networks allocate a tensor and fill it slice by slice, so that nothing is concatenated in
memory. PyTorch translates that to ScatterND over ranges of indices, unsupported by TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch


class _Span(NamedTuple):
    """Rows [start, stop) of a tensor along some dimension, taken from `value` at `offset`."""

    start: int
    stop: int
    value: Any
    offset: int
    rows: int  # of `value`


class ScatterRewriter:
    """Translations for one model; all sizes must be known."""

    def __init__(self, op: Any) -> None:
        """Store the opset that creates operators."""
        self._op = op
        # Result of a write -> dimension and spans. A span that a later write covers is dropped.
        self._spans: dict[Any, tuple[int, list[_Span]]] = {}

    def table(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """Return the translations by PyTorch operator, for `torch.onnx.export`."""
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
        """Replace every `step`-th row of x from `start` to `end` along `dim` by src."""
        dim, size, shape = dim % len(x.shape), x.shape[dim], list(x.shape)
        first, last, _ = slice(start, end).indices(size)
        if last <= first:
            return self._op.Identity(x)
        if step == 1:
            return self._replace_rows(x, size, src, dim, first, last)
        regular = size % step == 0 and first < step and last == size
        assert regular, "expected one row in each group of `step` rows"
        groups = self._reshape(x, [*shape[:dim], size // step, step, *shape[dim + 1 :]])
        row = self._op.Unsqueeze(src, self._ints([dim + 1]))
        return self._reshape(
            self._replace_rows(groups, step, row, dim + 1, first, first + 1), shape
        )

    def select_scatter(self, x: Any, src: Any, dim: int, index: int) -> Any:
        """Replace row `index` of x along `dim` by src."""
        index %= x.shape[dim]
        row = self._op.Unsqueeze(src, self._ints([dim % len(x.shape)]))
        return self._replace_rows(x, x.shape[dim], row, dim % len(x.shape), index, index + 1)

    def copy(self, x: Any, src: Any, non_blocking: bool = False) -> Any:
        """Expand src to the shape of x; the dtypes must be equal."""
        assert x.dtype == src.dtype, "a copy must not change the dtype"
        shape = list(x.shape)
        same = list(src.shape) == shape
        return self._op.Identity(src) if same else self._op.Expand(src, self._ints(shape))

    def split(self, x: Any, size: int, dim: int = 0) -> list[Any]:
        """Split x into `size` rows each, the last one having the rest."""
        rows = x.shape[dim]
        return [
            self._rows(_Span(low, min(low + size, rows), x, low, rows), dim % len(x.shape))
            for low in range(0, rows, size)
        ]

    def _replace_rows(self, x: Any, size: int, src: Any, dim: int, first: int, last: int) -> Any:
        """Replace rows `first` to `last` of x, of `size` rows along `dim`, by src."""
        known_dim, spans = self._spans.get(x, (dim, []))
        if known_dim != dim or not spans:
            spans = [_Span(0, size, x, 0, size)]
        left = [span._replace(stop=min(span.stop, first)) for span in spans]
        cut = [max(0, last - span.start) for span in spans]
        right = [
            span._replace(start=span.start + rows, offset=span.offset + rows)
            for span, rows in zip(spans, cut, strict=True)
        ]
        spans = [*left, _Span(first, last, src, 0, last - first), *right]
        spans = [span for span in spans if span.start < span.stop]
        values = [self._rows(span, dim) for span in spans]
        covered = len(values) == 1
        result = self._op.Identity(src) if covered else self._op.Concat(*values, axis=dim)
        self._spans[result] = (dim, spans)
        return result

    def _rows(self, span: _Span, dim: int) -> Any:
        """Slice the rows of a span out of its value."""
        stop = span.offset + span.stop - span.start
        if (span.offset, stop) == (0, span.rows):
            return span.value
        bounds = [self._ints([bound]) for bound in (span.offset, stop, dim)]
        return self._op.Slice(span.value, *bounds)

    def _reshape(self, x: Any, shape: Sequence[int]) -> Any:
        return self._op.Reshape(x, self._ints(shape))

    def _ints(self, values: Sequence[int]) -> Any:
        return self._op.Constant(value_ints=list(values))


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method in a function: PyTorch sets an attribute on translations."""

    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        return method(*args, **options)

    return call
