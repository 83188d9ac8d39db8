# SPDX-License-Identifier: Apache-2.0
"""Build an ONNX graph of fp32 operators with known shapes, node by node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_SAME = frozenset({"Add", "Clip", "Div", "Mul", "Sigmoid", "Softmax"})  # as large as their input


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of a graph."""

    name: str
    shape: tuple[int, ...]


class Graph:
    """An ONNX graph that grows. Operators and their results are named by kind and number."""

    def __init__(self, onnx: Any) -> None:
        """Start an empty graph, made by the package `onnx`."""
        self._onnx = onnx
        self._nodes: list[Any] = []
        self._constants: dict[tuple[object, ...], Any] = {}
        self._ports: dict[str, list[Any]] = {"input": [], "output": []}

    def input(self, name: str, shape: tuple[int, ...]) -> Value:
        """Add an input."""
        return self._port("input", name, shape)

    def output(self, name: str, x: Value) -> None:
        """Make x an output of this name."""
        self._port("output", name, x.shape)
        self._nodes.append(self._onnx.helper.make_node("Identity", [x.name], [name], name=name))

    def node(
        self, kind: str, *inputs: Value, shape: Sequence[int] = (), **attributes: Any
    ) -> Value:
        """Add an operator and return its only result; elementwise ones need no `shape`."""
        name = f"{kind}_{len(self._nodes)}"
        sources = [x.name for x in inputs]
        self._nodes.append(
            self._onnx.helper.make_node(kind, sources, [name], name=name, **attributes)
        )
        return Value(name, inputs[0].shape if kind in _SAME else tuple(shape))

    def weights(self, name: str, x: Tensor) -> Value:
        """Add a constant with the values of x, fp32, once for a name."""
        if (name,) not in self._constants:
            values = x.contiguous().cpu().numpy()
            self._constants[name,] = self._onnx.numpy_helper.from_array(values, name)
        return Value(name, tuple(x.shape))

    def number(self, value: float) -> Value:
        """Return a scalar constant."""
        return self._constant("FLOAT", [value], ())

    def ints(self, *values: int) -> Value:
        """Return a constant list of integers."""
        return self._constant("INT64", list(values), (len(values),))

    def reshape(self, x: Value, *shape: int) -> Value:
        """Give x another shape."""
        assert math.prod(shape) == math.prod(x.shape), f"{x.shape} cannot become {shape}"
        return x if shape == x.shape else self.node("Reshape", x, self.ints(*shape), shape=shape)

    def transpose(self, x: Value, *order: int) -> Value:
        """Permute the dimensions of x."""
        return self.node("Transpose", x, shape=[x.shape[i] for i in order], perm=order)

    def expand(self, x: Value, *shape: int) -> Value:
        """Repeat x along its dimensions of 1."""
        return self.node("Expand", x, self.ints(*shape), shape=shape)

    def split(self, x: Value, dim: int, count: int, size: int | None = None) -> list[Value]:
        """Split x into `count` parts of `size` along a dimension, the last one having the rest."""
        # Not Slice: TensorRT's parser makes 27 layers of one.
        if count == 1:
            return [x]
        size = size or x.shape[dim] // count
        sizes = [*[size] * (count - 1), x.shape[dim] - size * (count - 1)]
        name = f"Split_{len(self._nodes)}"
        results = [f"{name}.{index}" for index in range(count)]
        inputs = [x.name, self.ints(*sizes).name]
        self._nodes.append(
            self._onnx.helper.make_node("Split", inputs, results, name=name, axis=dim)
        )
        before, after = x.shape[:dim], x.shape[dim + 1 :]
        shapes = [(*before, part, *after) for part in sizes]
        return [Value(*result) for result in zip(results, shapes, strict=True)]

    def gather(self, x: Value, dim: int, indices: Sequence[int]) -> Value:
        """Take some positions of x along a dimension."""
        if list(indices) == list(range(x.shape[dim])):
            return x
        shape = (*x.shape[:dim], len(indices), *x.shape[dim + 1 :])
        return self.node("Gather", x, self.ints(*indices), shape=shape, axis=dim)

    def concat(self, parts: Sequence[Value], dim: int) -> Value:
        """Join parts along a dimension."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0].shape
        total = sum(part.shape[dim] for part in parts)
        shape = (*first[:dim], total, *first[dim + 1 :])
        return self.node("Concat", *parts, shape=shape, axis=dim)

    def model(self, name: str, opset: int) -> Any:
        """Return the finished model."""
        helper = self._onnx.helper
        graph = helper.make_graph(
            self._nodes,
            name,
            self._ports["input"],
            self._ports["output"],
            list(self._constants.values()),
        )
        versions = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=versions, ir_version=10)

    def _port(self, side: str, name: str, shape: tuple[int, ...]) -> Value:
        info = self._onnx.helper.make_tensor_value_info(name, self._onnx.TensorProto.FLOAT, shape)
        self._ports[side].append(info)
        return Value(name, shape)

    def _constant(self, dtype: str, values: list[Any], shape: tuple[int, ...]) -> Value:
        key = (dtype, tuple(values), shape)
        name = f"{dtype.lower()}_{len(self._constants)}"
        if key not in self._constants:
            number = getattr(self._onnx.TensorProto, dtype)
            self._constants[key] = self._onnx.helper.make_tensor(name, number, shape, values)
        return Value(self._constants[key].name, shape)
