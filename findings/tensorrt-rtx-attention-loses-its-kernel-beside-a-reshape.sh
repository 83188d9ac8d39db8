#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# TensorRT for RTX: an Unsqueeze before ONNX Attention makes it take four times the scratch memory.
#
# A good guess: [heads, tokens, width] and [1, heads, tokens, width] are the same bytes, so a model whose
# graph adds the leading dimension is compiled to what one with that dimension in its inputs is.
# What happens: with the dimension in the inputs, the plan takes one tensor of scratch; with Unsqueeze
# before and Squeeze after the node, four. A Transpose of queries or values costs one more each. Nothing
# is said, and both are built. For sm_80 and sm_86 it is four either way.
# Whom it hurts: whoever exports scaled_dot_product_attention from PyTorch, where a batch of one is
# usually added in the graph: at 249,240 tokens of 24 heads it is 5.7 GiB in place of 1.4.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet onnx==1.23.2 \
    tensorrt-rtx-cu13-bindings==1.7.1.116 tensorrt-rtx-cu13-libs==1.7.1.116
cat > "$work/attention.py" <<'PY'
import re

import tensorrt_rtx_bindings as trt
from onnx import TensorProto, helper

HEADS, TOKENS, WIDTH = 24, 8192, 128
SIZE = 2 * HEADS * TOKENS * WIDTH


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.scratch = None

    def log(self, severity, msg):
        if match := re.search(r"Max Scratch Memory: (\d+) bytes", msg):
            self.scratch = int(match[1])


log = Log()
builder = trt.Builder(log)


def scratch(nodes, shape, target="SM89"):
    """Build a plan, and return its scratch memory in tensors of the size of the queries."""
    ports = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, shape) for name in "qkvy"]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [0])
    graph = helper.make_graph(nodes, "attention", ports[:3], ports[3:], [axis])
    opsets = [helper.make_opsetid("", 23)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, log).parse(model.SerializeToString())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.__members__[target], 0)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 36)
    assert builder.build_serialized_network(network, config) is not None
    return log.scratch / SIZE


node = helper.make_node
plain = [node("Attention", ["q", "k", "v"], ["y"])]
added = [node("Unsqueeze", [name, "axis"], [f"{name}1"]) for name in "qkv"]
added += [node("Attention", ["q1", "k1", "v1"], ["y1"]), node("Squeeze", ["y1", "axis"], ["y"])]

print("tensorrt-rtx", trt.__version__)
for target in ("SM89", "SM120"):
    given = scratch(plain, (1, HEADS, TOKENS, WIDTH), target)
    in_graph = scratch(added, (HEADS, TOKENS, WIDTH), target)
    print(f"{target}: {given:.1f} tensors; with the dimension added in the graph, {in_graph:.1f}")
    assert given < 1.1
    assert in_graph > 3.9, "it is not four times as much any more"
PY
"$work/venv/bin/python" "$work/attention.py"
