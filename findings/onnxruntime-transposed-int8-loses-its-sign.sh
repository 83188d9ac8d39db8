#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# ONNX Runtime on a CPU: a transposed int8 weight loses its negative values.
#
# A good guess: DequantizeLinear of an int8 tensor whose zero point is left out (it is optional, and then
# zero), Transpose, MatMul is a product with the dequantized weight, at every optimization level.
# What happens: from the level "basic" on, an optimizer puts QuantizeLinear and DequantizeLinear behind
# the Transpose, also without a zero point. Without one, QuantizeLinear makes uint8: every negative value
# becomes 0. Nothing warns; the result has the right shape and type.
# Whom it hurts: who quantizes the weights of linear layers symmetrically and exports x @ W.T as exporters
# do. Given a zero point, or as Gemm with transB = 1, the same model is right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

print("onnx", onnx.__version__, "onnxruntime", onnxruntime.__version__)
node, tensor, value = helper.make_node, helper.make_tensor, helper.make_tensor_value_info
LEVELS = onnxruntime.GraphOptimizationLevel
random = np.random.default_rng(0)
x = random.standard_normal((4, 32)).astype(np.float32)
w = random.integers(-127, 128, (16, 32)).astype(np.int8)
exact = x.astype(np.float64) @ (w / 128).T
positive = x.astype(np.float64) @ (w.clip(0) / 128).T


def run(level, zero_point=(), last=None):
    last = last or [node("Transpose", ["d"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])]
    graph = helper.make_graph(
        [node("DequantizeLinear", ["w", "scale", *zero_point], ["d"]), *last],
        "linear",
        [value("x", TensorProto.FLOAT, [4, 32]), value("w", TensorProto.INT8, [16, 32])],
        [value("y", TensorProto.FLOAT, [4, 16])],
        [tensor("scale", TensorProto.FLOAT, [], [2**-7]), tensor("zero", TensorProto.INT8, [], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 3, level
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    return session.run(None, {"x": x, "w": w})[0]


def error(y, expected=exact):
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


gemm = [node("Gemm", ["x", "d"], ["y"], transB=1)]
right, wrong = run(LEVELS.ORT_DISABLE_ALL), run(LEVELS.ORT_ENABLE_BASIC)
print(f"relative error without optimization {error(right):.1e}, basic {error(wrong):.1e}, "
      f"with a zero point {error(run(LEVELS.ORT_ENABLE_ALL, ['zero'])):.1e}, "
      f"as Gemm {error(run(LEVELS.ORT_ENABLE_ALL, last=gemm)):.1e}")
print(f"basic, beside the product of the positive values alone: {error(wrong, positive):.1e}")
assert error(right) < 1e-6
assert error(run(LEVELS.ORT_ENABLE_ALL, ["zero"])) < 1e-6
assert error(run(LEVELS.ORT_ENABLE_ALL, last=gemm)) < 1e-6
assert error(wrong) > 0.3
assert error(wrong, positive) < 1e-6
PY
