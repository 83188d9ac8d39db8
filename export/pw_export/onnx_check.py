# SPDX-License-Identifier: Apache-2.0
"""Whether an ONNX model is one of a segment, as TensorRT wants it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from pw_engines import DType, EngineSpec, TensorSpec
from pw_engines.engine import EngineError
from pw_engines.tensorrt.onnx_rules import check_importable

LARGEST: Final = 1 << 20  # bytes; a model without weights has a tenth of it
_KINDS: Final[dict[DType, str]] = {
    "fp32": "FLOAT",
    "bf16": "BFLOAT16",
    "fp16": "FLOAT16",
    "int64": "INT64",
}


def check_onnx(model: bytes, spec: EngineSpec) -> None:
    """Check that a model is valid, that TensorRT's parser takes it, and that it is of `spec`.

    Args:
        model: serialised, weights being inputs.
        spec: of the segment: names, dtypes and shapes of inputs and outputs, in order. A named
            dimension may have its name, or its limit.

    Raises:
        EngineError: one line per fault. Also where the package onnx is missing.
    """
    check_importable(model)
    import onnx

    graph = onnx.load_model_from_string(model).graph
    faults = [*_port_faults("input", graph.input, spec.inputs, spec)]
    faults += _port_faults("output", graph.output, spec.outputs, spec)
    if len(model) > LARGEST:
        faults.append(f"{len(model)} bytes, wanted at most {LARGEST}: it holds weights or tables")
    if faults:
        raise EngineError("\n  ".join([f"the ONNX model is not one of {spec.segment}:", *faults]))


def _port_faults(
    side: str, found: Sequence[Any], wanted: Sequence[TensorSpec], spec: EngineSpec
) -> Iterator[str]:
    """Inputs or outputs that are missing, too many, or of another dtype or shape."""
    import onnx

    got, expected = [one.name for one in found], [one.name for one in wanted]
    if got != expected:
        yield f"{side}s: wanted {', '.join(expected)}, got {', '.join(got)}"
        return
    limits = dict(spec.limits)
    for one, port in zip(wanted, found, strict=True):
        kind = onnx.TensorProto.DataType.Name(port.type.tensor_type.elem_type)
        if kind != _KINDS[one.dtype]:
            yield f"{side} {one.name}: wanted {_KINDS[one.dtype]}, got {kind}"
        shape = tuple(dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim)
        if shape not in (one.shape, one.sized(limits)):
            yield f"{side} {one.name}: wanted {one.shape} or {one.sized(limits)}, got {shape}"
