# SPDX-License-Identifier: Apache-2.0
"""Two ways to run ONNX models on the CPU without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor


def run_widened(model: bytes, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run by ONNX Runtime with fp32 instead of bf16, for which it has no products."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(widened(model), options, ["CPUExecutionProvider"])
    wide = [x.float() if x.dtype == torch.bfloat16 else x for x in inputs]
    return [torch.from_numpy(x) for x in session.run(None, _named(model, wide))]


def run_reference(model: bytes, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run by the reference evaluator, which rounds to bf16 after every operator."""
    results = ReferenceEvaluator(onnx.load_model_from_string(model)).run(
        None, _named(model, inputs)
    )
    return [_tensor(np.asarray(x)) for x in results]


def widened(model: bytes) -> bytes:
    """Replace bf16 by fp32 in a model."""
    result = onnx.load_model_from_string(model)
    graph = result.graph
    for port in (*graph.input, *graph.output, *graph.value_info):
        if port.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            port.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    return result.SerializeToString()


def _named(model: bytes, inputs: Sequence[Tensor]) -> dict[str, Any]:
    names = [port.name for port in onnx.load_model_from_string(model).graph.input]
    return {name: _array(x) for name, x in zip(names, inputs, strict=True)}


def _array(x: Tensor) -> Any:
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if x.dtype == torch.float8_e4m3fn:
        return x.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return x.numpy()


def _tensor(x: Any) -> Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())
