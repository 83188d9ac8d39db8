# SPDX-License-Identifier: Apache-2.0
"""ONNX models of quantized segments compute what our arithmetic does, without PyTorch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import onnx
import pytest
import torch
from torch import Tensor

from pw_engines.engine import TOLERANCES, random_inputs
from pw_export.onnx_check import check_onnx
from pw_export.onnx_export import export_segment
from pw_kernels.quantized_linear import GRIDS, NumberFormat, quantize_rows
from pw_runtime.execution.transformer_segments import Segment, segments_of
from pw_runtime.types import Precision
from tests.closeness import relative_l2
from tests.export.runners import run_reference, run_widened
from tests.networks import TINY_DRAFT

CPU = torch.device("cpu")
TOKENS = 24
CONFIG = replace(TINY_DRAFT, num_layers=1)
PARTS = ("block_in", "block_out")
QUANTIZERS = ("QuantizeLinear", "TRT_FP4DynamicQuantize")


@cache
def segment_of(part: str, precision: Precision, linear: NumberFormat) -> Segment:
    name = f"{part}_{linear.replace('-', '_')}"
    return segments_of(CONFIG, precision, TOKENS, linear)[name]


def inputs_of(segment: Segment, linear: NumberFormat) -> list[Tensor]:
    """Return activations as `random_inputs` makes them, and weights that were quantized."""
    spec = segment.spec
    drawn = random_inputs(spec, dict(spec.limits), CPU, 0)
    inputs = {tensor.name: x for tensor, x in zip(spec.inputs, drawn, strict=True)}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in inputs if name.endswith(".scale")]:
        weight = f"{name.removesuffix('.scale')}.weight"
        channels, width = inputs[weight].shape
        values = torch.randn(channels, width, generator=generator) * width**-0.5
        inputs[weight], _, inputs[name] = quantize_rows(values, linear)
    return list(inputs.values())


@pytest.mark.parametrize("linear", ["int8", "int8-weight"])
@pytest.mark.parametrize("part", PARTS)
def test_onnx_runtime_computes_what_our_int8_arithmetic_does(
    part: str, linear: NumberFormat
) -> None:
    """Rounding aside: sums of fp32 before a quantization may decide another integer."""
    segment = segment_of(part, "fp32", linear)
    model = export_segment(segment)
    check_onnx(model, segment.spec)
    inputs = inputs_of(segment, linear)
    got, expected = run_widened(model, inputs), segment.module(*inputs)
    for a, b in zip(got, expected, strict=True):
        assert relative_l2(a, b) < (TOLERANCES["int8"] if linear == "int8" else 1e-6)


@pytest.mark.parametrize("linear", GRIDS)
@pytest.mark.parametrize("part", PARTS)
def test_operands_are_quantized_by_constants(part: str, linear: NumberFormat) -> None:
    """A scale that is computed or given would make TensorRT multiply floats."""
    segment = segment_of(part, "bf16", linear)
    model = export_segment(segment, varying=True)
    check_onnx(model, segment.spec)
    graph = onnx.load_model_from_string(model).graph
    known = {x.name for x in graph.initializer}
    known |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    inputs, layers = (1, 3) if part == "block_in" else (5, 5)  # q, k and v have the same input
    quantizers = [node for node in graph.node if node.op_type in QUANTIZERS]
    assert len(quantizers) == (0 if linear == "int8-weight" else inputs)
    assert all(node.input[1] in known for node in quantizers)
    if linear != "nvfp4":
        scales = [node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"]
        assert len(scales) == len(quantizers) + layers
        assert sum(node.op_type == "Gemm" for node in graph.node) == layers
        assert known.issuperset(scales)


@pytest.mark.parametrize("part", PARTS)
def test_the_reference_evaluator_computes_what_our_fp8_arithmetic_does(part: str) -> None:
    segment = segment_of(part, "fp32", "fp8")
    inputs = inputs_of(segment, "fp8")
    got, expected = run_reference(export_segment(segment), inputs), segment.module(*inputs)
    for a, b in zip(got, expected, strict=True):
        assert relative_l2(a, b) < TOLERANCES["fp8"]
