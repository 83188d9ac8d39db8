# SPDX-License-Identifier: Apache-2.0
"""What an ONNX model may contain so that TensorRT's parser takes it.

The table is of the operators that our segments may need, a part of the parser's own table of
TensorRT 10.15 (onnx-tensorrt, docs/operators.md): a fault is found in a second, here, and not
after minutes on a machine with a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from pw_engines.engine import EngineError

OPSETS: Final = range(9, 25)
NEWEST_IR: Final = 12  # of ONNX 1.19, the release of opset 24
LARGEST_CONSTANT: Final = 64 << 10  # bytes; more is a weight that should have been an input

_FLOATS: Final = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_NUMBERS: Final = _FLOATS | {"INT32", "INT64"}
_ALL: Final = _NUMBERS | {"BOOL"}
_OPERATORS: Final[Mapping[frozenset[str], str]] = MappingProxyType(
    {
        _FLOATS: "Attention Clip Conv Cos Erf Exp Gelu Gemm LayerNormalization MatMul Reciprocal "
        "Resize RMSNormalization RotaryEmbedding Sigmoid Sin Softmax Sqrt Tanh",
        _NUMBERS: "Abs Add Div Max Min Mul Neg Pad Pow ReduceL2 ReduceMax ReduceMean ReduceSum "
        "Relu Sub",
        _ALL: "Cast Concat Constant ConstantOfShape Expand Flatten Gather Identity Reshape Shape "
        "Slice Split Squeeze Tile Transpose Unsqueeze Where",
    }
)
ALLOWED: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {name: types for types, names in _OPERATORS.items() for name in names.split()}
)
# The input, by position, that is a mask, positions or sizes and has a type of its own.
_NO_DATA: Final[Mapping[str, int]] = MappingProxyType(
    {"Attention": 3, "Resize": 3, "RotaryEmbedding": 3}
)
# Inputs, by position, that must be known when the plan is built.
_CONSTANT: Final[Mapping[str, int]] = MappingProxyType(
    {
        **dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum"), 1),
        **dict.fromkeys(("Squeeze", "Unsqueeze"), 1),
        "Slice": 3,
    }
)


def check_importable(model: bytes, *, weights_inside: bool = False) -> None:
    """Check that TensorRT's parser will take an ONNX model.

    Args:
        model: serialised, with all its data.
        weights_inside: weights are constants of the model; else a constant of more than
            LARGEST_CONSTANT bytes is a fault.

    Raises:
        EngineError: the model is damaged or wrong, or not for TensorRT: one line per fault,
            naming the node. Also where the package onnx is missing.
    """
    onnx = _onnx()
    try:
        parsed = onnx.load_model_from_string(model)
        onnx.checker.check_model(parsed, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(parsed, check_type=True, strict_mode=True)
    except Exception as error:  # protobuf and onnx raise types of their own
        raise EngineError(f"the ONNX model is not valid: {error}") from error
    faults = [*_model_faults(parsed), *_node_faults(onnx, inferred.graph)]
    if not weights_inside:
        faults += _constant_faults(onnx, parsed.graph)
    if faults:
        raise EngineError("\n  ".join(["TensorRT cannot import the ONNX model:", *faults]))


def _onnx() -> Any:
    try:
        onnx: Any = importlib.import_module("onnx")
        for part in ("checker", "shape_inference", "numpy_helper"):
            importlib.import_module(f"onnx.{part}")
    except ImportError as error:
        raise EngineError(
            f'the package onnx is needed ({error}): pip install "pixelwizard-runtime[tensorrt]"'
        ) from error
    return onnx


def _model_faults(model: Any) -> Iterator[str]:
    if model.ir_version > NEWEST_IR:
        yield f"IR version {model.ir_version}, wanted at most {NEWEST_IR}: export opset 20"
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            wanted = f"{OPSETS.start} to {OPSETS.stop - 1}"
            yield f"opset {opset.version}, wanted {wanted}: export opset 20"
    for function in model.functions:
        yield f"function {function.domain}.{function.name}: wanted operators only"


def _constant_faults(onnx: Any, graph: Any) -> Iterator[str]:
    """Constants too large to be anything but weights."""
    found = [(one.name, one) for one in graph.initializer]
    found += [
        (node.output[0], attribute.t)
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    for name, tensor in found:
        size = onnx.numpy_helper.to_array(tensor).nbytes
        if size > LARGEST_CONSTANT:
            yield (
                f"constant {name} of {size} bytes, wanted at most {LARGEST_CONSTANT}: "
                "make weights inputs of the segment"
            )


def _node_faults(onnx: Any, graph: Any) -> Iterator[str]:
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {one.name: one.type.tensor_type.elem_type for one in values}
    types |= {one.name: one.data_type for one in graph.initializer}
    names = {name: onnx.TensorProto.DataType.Name(kind) for name, kind in types.items()}
    ranks = {one.name: len(one.type.tensor_type.shape.dim) for one in values}
    ranks |= {one.name: len(one.dims) for one in graph.initializer}
    constants = {one.name for one in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        where = f"node {node.name or node.output[0]} ({node.op_type})"
        for fault in (
            *_type_faults(node, names),
            *_input_faults(node, ranks, constants),
            *_attribute_faults(onnx, node),
        ):
            yield f"{where}: {fault}"


def _type_faults(node: Any, names: Mapping[str, str]) -> Iterator[str]:
    """Operators and types that are not in the table."""
    if node.domain not in ("", "ai.onnx"):
        yield f"domain {node.domain}, wanted the standard one"
        return
    if node.op_type not in ALLOWED:
        yield "no operator of the table"
        return
    allowed = ALLOWED[node.op_type]
    # Further inputs of operators on any type are axes, sizes and conditions, which have their own.
    inputs = list(node.input) if allowed == _FLOATS else node.input[:1]
    for name in (*inputs[: _NO_DATA.get(node.op_type)], *node.output):
        kind = names.get(name)
        if kind is not None and kind not in allowed:
            yield f"{name} is {kind}, wanted {', '.join(sorted(allowed))}"


def _input_faults(node: Any, ranks: Mapping[str, int], constants: set[str]) -> Iterator[str]:
    """Inputs of a rank, a kind or a number that the parser does not take."""
    place = _CONSTANT.get(node.op_type, len(node.input))
    if place < len(node.input) and node.input[place] and node.input[place] not in constants:
        yield f"input {node.input[place]} is computed, wanted a constant"
    if node.op_type == "LayerNormalization" and any(node.output[1:]):
        yield "more than its first output is used"
    if node.op_type == "Attention":
        if any(node.input[4:]) or any(node.output[1:]):
            yield "a cache, or more than its first output, is used"
        for name in filter(None, node.input[:4]):
            if ranks.get(name, 4) != 4:
                yield f"input {name} has rank {ranks[name]}, wanted 4"


def _attribute_faults(onnx: Any, node: Any) -> Iterator[str]:
    given = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    if node.op_type == "Attention":
        for name in ("softcap", "qk_matmul_output_mode"):
            if name in given:  # the exporter of PyTorch writes their defaults
                yield f"attribute {name}: delete it, even with its default value"
    if node.op_type == "Gemm":
        for name in ("alpha", "beta"):
            if given.get(name, 1.0) != 1.0:
                yield f"attribute {name} of {given[name]}, wanted 1: it becomes an fp32 constant"
    if node.op_type == "Resize" and (given.get("antialias") or given.get("mode") == b"cubic"):
        yield "antialiasing and cubic interpolation are not supported"
