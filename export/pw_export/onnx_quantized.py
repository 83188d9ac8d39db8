# SPDX-License-Identifier: Apache-2.0
"""The product of quantized operands in ONNX, as compilers recognise it.

Quantize and dequantize around a product of floats: TensorRT makes one product of 8-bit or 4-bit
numbers of it. Scales are constants, since only then does its builder keep the operands quantized
(docs/engines.md).
"""

from __future__ import annotations

from typing import Any

from pw_kernels.quantized_linear import BLOCK, GRIDS, NumberFormat


def product_of_quantized(onnx: Any, onnxscript: Any) -> Any:
    """Return the translation of `pw::quantized_product`, made with these packages."""
    types, tensor = onnx.TensorProto, onnx.helper.make_tensor
    _declare_fp4_quantization(onnx)

    def translate(x: Any, weight: Any, blocks: Any, number_format: NumberFormat, low: bool) -> Any:
        # Block scales and numbers of 4 bits are dequantized since opset 23.
        op = onnxscript.opset23 if number_format == "nvfp4" else onnxscript.opset20
        unit, dtype = GRIDS[number_format].unit, types.BFLOAT16 if low else types.FLOAT
        fine = op.Constant(value=tensor("unit", types.FLOAT, [], [unit]))
        coarse = op.Constant(value=tensor("unit", dtype, [], [unit]))  # decides the product's type
        if number_format == "nvfp4":
            trt = onnxscript.values.Opset("trt", 1)
            numbers, scales = trt.TRT_FP4DynamicQuantize(
                x, coarse, axis=-1, block_size=BLOCK, scale_type=types.FLOAT8E4M3FN
            )
            left = op.DequantizeLinear(
                numbers, op.DequantizeLinear(scales, coarse), axis=-1, block_size=BLOCK
            )
            right = op.DequantizeLinear(
                weight, op.DequantizeLinear(blocks, coarse), axis=-1, block_size=BLOCK
            )
        else:
            stored = types.FLOAT8E4M3FN if number_format == "fp8" else types.INT8
            zero = op.Constant(value=tensor("zero", stored, [], [0]))
            left = x
            if GRIDS[number_format].quantizes_input:
                left = op.DequantizeLinear(op.QuantizeLinear(x, fine, zero), coarse)
            right = op.DequantizeLinear(weight, coarse)
        # Not MatMul of a transposed weight: findings/onnxruntime-transposed-int8-loses-its-sign.sh
        return op.Gemm(left, right, transB=1)

    return translate


def _declare_fp4_quantization(onnx: Any) -> None:
    """Tell the package onnx about TensorRT's own operator, which quantizes to nvfp4 by blocks."""
    name, defs = "TRT_FP4DynamicQuantize", onnx.defs
    if defs.has(name, domain="trt"):
        return
    schema = defs.OpSchema
    integers = {
        attribute: schema.AttrType.INT for attribute in ("axis", "block_size", "scale_type")
    }
    defs.register_schema(
        schema(
            name,
            "trt",
            1,
            inputs=[schema.FormalParameter("x", "T"), schema.FormalParameter("scale", "T")],
            outputs=[
                schema.FormalParameter("numbers", "tensor(float4e2m1)"),
                schema.FormalParameter("block_scales", "tensor(float8e4m3fn)"),
            ],
            type_constraints=[("T", ["tensor(float)", "tensor(bfloat16)"], "floats")],
            attributes=[
                schema.Attribute(key, kind, required=True) for key, kind in integers.items()
            ],
        )
    )
