# SPDX-License-Identifier: Apache-2.0
"""Check that an ONNX model implements a segment in a form that TensorRT accepts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from pw_engines import DType, EngineSpec, TensorSpec
from pw_engines.engine import EngineError
from pw_engines.tensorrt.onnx_rules import check_importable

LARGEST: Final = 1 << 20  # bytes; models without weights have a tenth of that
_DTYPES: Final[dict[DType, str]] = {
    "fp32": "FLOAT",
    "bf16": "BFLOAT16",
    "fp16": "FLOAT16",
    "int64": "INT64",
    "int8": "INT8",
    "fp8": "FLOAT8E4M3FN",
    "fp4": "FLOAT4E2M1",
}


def check_onnx(model: bytes, spec: EngineSpec) -> None:
    """Check that a model is valid, that TensorRT's parser accepts it, and that it fits `spec`.

    Args:
        model: serialised model whose weights are inputs.
        spec: names, dtypes and shapes of the segment's inputs and outputs, in order. A named
            dimension may have its name or its limit in the model.

    Raises:
        EngineError: with a line per fault; also if the package onnx is missing.
    """
    check_importable(model)
    import onnx

    graph = onnx.load_model_from_string(model).graph
    faults = [*_port_faults("input", graph.input, spec.inputs, spec)]
    faults += _port_faults("output", graph.output, spec.outputs, spec)
    if len(model) > LARGEST:
        faults.append(f"{len(model)} bytes, expected at most {LARGEST}: contains weights or tables")
    if faults:
        raise EngineError("\n  ".join([f"the ONNX model does not fit {spec.segment}:", *faults]))


def _port_faults(
    side: str, ports: Sequence[Any], tensors: Sequence[TensorSpec], spec: EngineSpec
) -> Iterator[str]:
    """Describe inputs or outputs that are missing, surplus, or of another dtype or shape."""
    import onnx

    got, expected = [port.name for port in ports], [tensor.name for tensor in tensors]
    if got != expected:
        yield f"{side}s: expected {', '.join(expected)}, got {', '.join(got)}"
        return
    limits = dict(spec.limits)
    for tensor, port in zip(tensors, ports, strict=True):
        name, dtype = f"{side} {tensor.name}", _DTYPES[tensor.dtype]
        port_dtype = onnx.TensorProto.DataType.Name(port.type.tensor_type.elem_type)
        if port_dtype != dtype:
            yield f"{name}: expected {dtype}, got {port_dtype}"
        shape = tuple(dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim)
        if shape not in (tensor.shape, tensor.numbers(limits)):
            yield f"{name}: expected {tensor.shape} or {tensor.numbers(limits)}, got {shape}"
