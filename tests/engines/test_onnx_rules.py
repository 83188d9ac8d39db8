# SPDX-License-Identifier: Apache-2.0
"""Models that TensorRT's parser takes pass; others are refused with node and reason."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pw_engines.engine import EngineError
from pw_engines.spec import EngineSpec, TensorSpec
from pw_engines.tensorrt.onnx_rules import check_importable
from tests.engines.tensorrt.segments import onnx_of, spec

node = helper.make_node


def graph(made: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], **model: Any) -> bytes:
    """A model of the nodes; inputs and outputs are name -> (type, shape)."""
    values = [
        [helper.make_tensor_value_info(name, *what) for name, what in group.items()]
        for group in (inputs, outputs)
    ]
    opset = model.pop("opset", 20)
    constants = model.pop("constants", {})
    tensors = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    body = helper.make_graph(made, "g", *values, tensors)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(body, opset_imports=opsets, ir_version=10).SerializeToString()


BF16, FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT
HEADS = {name: (BF16, (1, 4, 8, 16)) for name in "qkv"}


def attention(**attributes: Any) -> bytes:
    made = [node("Attention", ["q", "k", "v"], ["y"], name="attend", **attributes)]
    return graph(made, HEADS, {"y": (BF16, (1, 4, 8, 16))}, opset=23)


def refused(model: bytes) -> str:
    with pytest.raises(EngineError) as caught:
        check_importable(model)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_our_segments_pass(dtype: Any) -> None:
    check_importable(onnx_of(spec(dtype)))


def test_a_block_of_a_transformer_passes() -> None:
    shape = (BF16, ("tokens", 64))
    made = [
        node("Cast", ["x"], ["wide"], to=FP32),
        node("ReduceMean", ["wide", "axes"], ["mean"]),
        node("Sub", ["wide", "mean"], ["centred"]),
        node("Cast", ["centred"], ["h"], to=BF16),
        node("LayerNormalization", ["h", "scale"], ["normal"], axis=-1),
        node("Reshape", ["normal", "heads"], ["split"]),
        node("Transpose", ["split"], ["turned"], perm=[1, 0, 2]),
        node("Softmax", ["turned"], ["soft"]),
        node("Slice", ["soft", "zero", "one", "zero"], ["first"]),
        node("Squeeze", ["first", "zero"], ["flat"]),
        node("Sigmoid", ["flat"], ["y"]),
    ]
    constants = {
        "axes": np.array([1]), "heads": np.array([0, 4, 16]), "zero": np.array([0]),
        "one": np.array([1]),
    }  # fmt: skip
    inputs = {"x": shape, "scale": (BF16, (64,))}
    check_importable(graph(made, inputs, {"y": (BF16, ("tokens", 16))}, constants=constants))


def test_attention_without_the_exporters_attributes_passes() -> None:
    check_importable(attention(scale=0.25))


@pytest.mark.parametrize("name", ["softcap", "qk_matmul_output_mode"])
def test_attention_with_the_exporters_attributes_is_refused(name: str) -> None:
    value = 0.0 if name == "softcap" else 0
    message = f"node attend (Attention): attribute {name}: delete it, even with its default value"
    assert message in refused(attention(**{name: value}))


def test_attention_of_rank_three_is_refused() -> None:
    inputs = {name: (BF16, (1, 8, 64)) for name in "qkv"}
    made = [node("Attention", [*inputs], ["y"], name="a", q_num_heads=4, kv_num_heads=4)]
    message = refused(graph(made, inputs, {"y": (BF16, (1, 8, 64))}, opset=23))
    assert "node a (Attention): input q has rank 3, expected 4" in message


def test_operators_outside_the_table_are_refused() -> None:
    message = refused(graph([node("Det", ["x"], ["y"], name="d")], {"x": (FP32, (3, 3))},
                         {"y": (FP32, ())}))  # fmt: skip
    assert "node d (Det): operator not in the table" in message


def test_types_outside_the_table_are_refused() -> None:
    double = (TensorProto.DOUBLE, (2, 2))
    message = refused(graph([node("Sqrt", ["x"], ["y"])], {"x": double}, {"y": double}))
    assert "node y (Sqrt): x is DOUBLE, expected BFLOAT16, FLOAT, FLOAT16" in message


def test_operators_of_other_domains_are_refused() -> None:
    made = helper.make_node("Attend", ["x"], ["y"], name="own", domain="ours")
    value = helper.make_tensor_value_info("x", FP32, (2,))
    out = helper.make_tensor_value_info("y", FP32, (2,))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ours", 1)]
    model = helper.make_model(
        helper.make_graph([made], "g", [value], [out]), opset_imports=opsets, ir_version=10
    )
    assert "node own (Attend): domain ours, expected the standard one" in refused(
        model.SerializeToString()
    )


def test_gemm_of_rank_three_is_refused() -> None:
    one = spec()
    x = TensorSpec(name="x", dtype="bf16", shape=(1, "tokens", 32))
    message = refused(onnx_of(replace(one, inputs=(x, *one.inputs[1:]))))
    assert "is not valid" in message
    assert "node name: project" in message
    assert "rank 2" in message


def test_gemm_that_scales_is_refused() -> None:
    made = [node("Gemm", ["x", "weight", "bias"], ["y"], name="g", transB=1, alpha=0.5)]
    assert "node g (Gemm): attribute alpha of 0.5, expected 1" in refused(onnx_of(spec(), made))


def test_mixed_types_are_refused() -> None:
    one = spec()
    mixed = replace(one, inputs=(one.inputs[0], *spec("fp32").inputs[1:]))
    assert "node name: project" in refused(onnx_of(mixed))


def folded() -> bytes:
    one = spec("fp32", width=512)
    kept: EngineSpec = replace(one, inputs=(one.inputs[0], one.inputs[2]))
    weight = numpy_helper.from_array(np.zeros((64, 512), np.float32), "weight")
    return onnx_of(kept, initializers=(weight,))


def test_weights_that_became_constants_are_refused() -> None:
    message = refused(folded())
    assert "constant weight of 131072 bytes, expected at most 65536: make weights inputs" in message


def test_weights_inside_pass_where_they_are_meant() -> None:
    check_importable(folded(), weights_inside=True)


def test_computed_axes_are_refused() -> None:
    axes = {"x": (FP32, (2, 3)), "axes": (TensorProto.INT64, (1,))}
    message = refused(graph([node("ReduceMean", ["x", "axes"], ["y"], name="mean")], axes,
                         {"y": (FP32, ("n", "m"))}))  # fmt: skip
    assert "node mean (ReduceMean): input axes is computed, expected a constant" in message


def test_further_outputs_of_layer_normalization_are_refused() -> None:
    made = [node("LayerNormalization", ["x", "s"], ["y", "mean"], name="norm")]
    message = refused(graph(made, {"x": (FP32, (2, 8)), "s": (FP32, (8,))},
                         {"y": (FP32, (2, 8)), "mean": (FP32, (2, 1))}))  # fmt: skip
    assert "node norm (LayerNormalization): more than its first output is used" in message


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 25, reason="this onnx has no opset 25")
def test_newer_opsets_are_refused() -> None:
    message = refused(onnx_of(spec(), opset=25, ir=13))
    assert "opset 25, expected 9 to 24: export opset 20" in message
    assert "IR version 13, expected at most 12: export opset 20" in message


def test_older_opsets_are_refused() -> None:
    value = (FP32, (2,))
    message = refused(graph([node("Relu", ["x"], ["y"])], {"x": value}, {"y": value}, opset=8))
    assert "opset 8, expected 9 to 24: export opset 20" in message


def test_every_fault_is_told_at_once() -> None:
    message = refused(attention(softcap=0.0, qk_matmul_output_mode=0))
    assert message.count("attend") == 2


def test_damaged_models_are_refused() -> None:
    assert "the ONNX model is not valid" in refused(b"\x00nothing")
    assert "the ONNX model is not valid" in refused(onnx_of(spec())[:-40])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx_of(spec())
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "the package onnx is needed" in refused(model)
