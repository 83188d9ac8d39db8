#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# ONNX Runtime on a CPU: the Attention operator ignores softmax_precision in fp16.
#
# A good guess: softmax_precision = FLOAT makes the softmax of an fp16 Attention run in fp32, as its
# specification says, and raising the opset does not change a model's accuracy.
# What happens: at opsets 23 and 24 one kernel runs, and FLOAT, FLOAT16 and no attribute give the same
# bits. At opset 25 the operator is expanded into a subgraph: the attribute counts, and the result is
# several times nearer to the exact one, with or without it.
# Whom it hurts: who validates fp16 attention exports against ONNX Runtime: the error measured is that
# of its kernel, whatever the model says, and the opset moves it.
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
FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
random = np.random.default_rng(0)
shape = (1, 4, 256, 64)
inputs = {name: (3 * random.standard_normal(shape)).astype(np.float16) for name in "qkv"}


def run(opset, precision):
    attributes = {} if precision is None else {"softmax_precision": precision}
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], **attributes)
    values = [helper.make_tensor_value_info(name, FLOAT16, shape) for name in "qkvy"]
    graph = helper.make_graph([node], "attention", values[:3], values[3:])
    domain = helper.make_opsetid("", opset)
    model = helper.make_model(graph, opset_imports=[domain], ir_version=11)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    return session.run(None, inputs)[0]


q, k, v = (x.astype(np.float64) for x in inputs.values())
scores = q @ k.transpose(0, 1, 3, 2) / 8
weights = np.exp(scores - scores.max(-1, keepdims=True))
exact = weights / weights.sum(-1, keepdims=True) @ v
errors = {}
for opset in (23, 24, 25):
    default, single, half = (run(opset, precision) for precision in (None, FLOAT, FLOAT16))
    errors[opset] = [float(np.linalg.norm(y - exact) / np.linalg.norm(exact)) for y in (single, half)]
    same = bool((single == half).all() and (single == default).all())
    print(f"opset {opset}: fp32 softmax {errors[opset][0]:.1e}, fp16 softmax {errors[opset][1]:.1e} "
          f"from fp64; all settings bit-equal: {same}")
    assert same == (opset < 25), "the attribute is treated differently now"
assert errors[24][0] > 3 * errors[25][0]
PY
