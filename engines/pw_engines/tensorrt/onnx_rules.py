# SPDX-License-Identifier: Apache-2.0
"""Check that TensorRT's parser will take an ONNX model.

The table lists the operators that our segments may need, a subset of the parser's own table of
TensorRT 10.15 (onnx-tensorrt, docs/operators.md): a problem is found here in a second, and not
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
LARGEST_CONSTANT: Final = 64 << 10  # bytes; anything larger should have been an input

_FLOATS: Final = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_QUANTIZED: Final = frozenset({"INT8", "FLOAT8E4M3FN", "FLOAT4E2M1"})
_NUMBERS: Final = _FLOATS | {"INT32", "INT64"}
_ALL: Final = _NUMBERS | {"BOOL"}
_OPERATORS: Final[Mapping[frozenset[str], str]] = MappingProxyType(
    {
        _FLOATS: "Attention Clip Conv Cos Erf Exp Gelu Gemm LayerNormalization MatMul Reciprocal "
        "Resize RMSNormalization RotaryEmbedding Sigmoid Sin Softmax Sqrt Tanh",
        _NUMBERS: "Abs Add Div Max Min Mul Neg Pad Pow Range ReduceL2 ReduceMax ReduceMean "
        "ReduceSum Relu Sub",
        _FLOATS | _QUANTIZED: "DequantizeLinear QuantizeLinear",
        _ALL: "Cast Concat Constant ConstantOfShape Expand Flatten Gather Identity Reshape Shape "
        "Slice Split Squeeze Tile Transpose Unsqueeze Where",
    }
)
ALLOWED: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {name: types for types, names in _OPERATORS.items() for name in names.split()}
)
OWN: Final = frozenset({("trt", "TRT_FP4DynamicQuantize")})  # operators of TensorRT's parser
# Position of the input that is a mask, positions or sizes, and has a type of its own.
_NO_DATA: Final[Mapping[str, int]] = MappingProxyType(
    {"Attention": 3, "Resize": 3, "RotaryEmbedding": 3}
)
# Position of the input that must be known when the plan is built.
_CONSTANT: Final[Mapping[str, int]] = MappingProxyType(
    {
        **dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum"), 1),
        **dict.fromkeys(("Squeeze", "Unsqueeze"), 1),
        # A computed scale is taken too, but dequantizes the operands of the product: it has floats.
        "QuantizeLinear": 1,
        "Slice": 3,
    }
)


def check_importable(model: bytes, *, weights_inside: bool = False) -> None:
    """Check that TensorRT's parser will take an ONNX model.

    Args:
        model: serialised, with all its data.
        weights_inside: weights are constants of the model; otherwise a constant of more than
            LARGEST_CONSTANT bytes is an error.

    Raises:
        EngineError: the model is damaged or invalid, or not for TensorRT, with one line per
            problem naming the node; or the package onnx is missing.
    """
    onnx = _onnx()
    try:
        parsed = onnx.load_model_from_string(model)
        onnx.checker.check_model(parsed, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(parsed, check_type=True, strict_mode=True)
    except Exception as error:  # protobuf and onnx raise their own types
        raise EngineError(f"the ONNX model is not valid: {error}") from error
    problems = [*_model_problems(parsed), *_node_problems(onnx, inferred.graph)]
    if not weights_inside:
        problems += _constant_problems(onnx, parsed.graph)
    if problems:
        raise EngineError("\n  ".join(["TensorRT cannot import the ONNX model:", *problems]))


def _onnx() -> Any:
    try:
        onnx: Any = importlib.import_module("onnx")
        for module in ("checker", "shape_inference", "numpy_helper"):
            importlib.import_module(f"onnx.{module}")
    except ImportError as error:
        raise EngineError(
            f'the package onnx is needed ({error}): pip install "pixelwizard-runtime[onnx]"'
        ) from error
    return onnx


def _model_problems(model: Any) -> Iterator[str]:
    if model.ir_version > NEWEST_IR:
        yield f"IR version {model.ir_version}, expected at most {NEWEST_IR}: export opset 20"
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            supported = f"{OPSETS.start} to {OPSETS.stop - 1}"
            yield f"opset {opset.version}, expected {supported}: export opset 20"
    for function in model.functions:
        yield f"function {function.domain}.{function.name}: expected operators only"


def _constant_problems(onnx: Any, graph: Any) -> Iterator[str]:
    """Find constants too large to be anything but weights."""
    constants = [(initializer.name, initializer) for initializer in graph.initializer]
    constants += [
        (node.output[0], attribute.t)
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    for name, tensor_proto in constants:
        size = onnx.numpy_helper.to_array(tensor_proto).nbytes
        if size > LARGEST_CONSTANT:
            yield (
                f"constant {name} of {size} bytes, expected at most {LARGEST_CONSTANT}: "
                "make weights inputs of the segment"
            )


def _node_problems(onnx: Any, graph: Any) -> Iterator[str]:
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {initializer.name: initializer.data_type for initializer in graph.initializer}
    names = {name: onnx.TensorProto.DataType.Name(number) for name, number in types.items()}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    ranks |= {initializer.name: len(initializer.dims) for initializer in graph.initializer}
    constants = {initializer.name for initializer in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        where = f"node {node.name or node.output[0]} ({node.op_type})"
        for problem in (
            *_type_problems(node, names),
            *_input_problems(node, ranks, constants),
            *_attribute_problems(onnx, node),
        ):
            yield f"{where}: {problem}"


def _type_problems(node: Any, names: Mapping[str, str]) -> Iterator[str]:
    """Find operators and types that are not in the table."""
    if (node.domain, node.op_type) in OWN:
        return
    if node.domain not in ("", "ai.onnx"):
        yield f"domain {node.domain}, expected the standard one"
        return
    if node.op_type not in ALLOWED:
        yield "operator not in the table"
        return
    allowed = ALLOWED[node.op_type]
    # Other inputs of operators on any type are axes, sizes and conditions, with types of their own.
    inputs = list(node.input) if allowed == _FLOATS else node.input[:1]
    for name in (*inputs[: _NO_DATA.get(node.op_type)], *node.output):
        dtype = names.get(name)
        if dtype is not None and dtype not in allowed:
            yield f"{name} is {dtype}, expected {', '.join(sorted(allowed))}"


def _input_problems(node: Any, ranks: Mapping[str, int], constants: set[str]) -> Iterator[str]:
    """Find inputs that the parser does not take, by rank, number, or being computed."""
    index = _CONSTANT.get(node.op_type, len(node.input))
    if index < len(node.input) and node.input[index] and node.input[index] not in constants:
        yield f"input {node.input[index]} is computed, expected a constant"
    if node.op_type == "LayerNormalization" and any(node.output[1:]):
        yield "more than its first output is used"
    if node.op_type == "Attention":
        if any(node.input[4:]) or any(node.output[1:]):
            yield "a cache, or more than its first output, is used"
        for name in filter(None, node.input[:4]):
            if ranks.get(name, 4) != 4:
                yield f"input {name} has rank {ranks[name]}, expected 4"


def _attribute_problems(onnx: Any, node: Any) -> Iterator[str]:
    values = {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute}
    if node.op_type == "Attention":
        for name in ("softcap", "qk_matmul_output_mode"):
            if name in values:  # PyTorch's exporter writes their defaults
                yield f"attribute {name}: delete it, even with its default value"
    if node.op_type == "Gemm":
        for name in ("alpha", "beta"):
            if values.get(name, 1.0) != 1.0:
                yield f"attribute {name} of {values[name]}, expected 1: it becomes an fp32 constant"
    if node.op_type == "Resize" and (values.get("antialias") or values.get("mode") == b"cubic"):
        yield "antialiasing and cubic interpolation are not supported"
