#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# TensorRT for RTX: "Requested size" in the error about too little workspace is the limit, not the need.
#
# A good guess: WORKSPACE bounds what one tactic may take, as in TensorRT, so that a smaller limit gives a
# slower plan; and "OutOfMemory (Requested size was N bytes)" says how much is needed.
# What happens: the limit is for all activations of the graph. One byte below what the plan takes, no
# other plan is tried, and the build fails; N is the limit that was set, whatever it was.
# Whom it hurts: who ports a TensorRT build with its usual limit, and who raises the limit to the number
# in the message, or halves it until it fits. Build with a huge limit and read "Max Scratch Memory" among
# the messages of severity INFO.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet \
    tensorrt-rtx-cu13-bindings==1.7.1.116 tensorrt-rtx-cu13-libs==1.7.1.116
cat > "$work/workspace.py" <<'PY'
import re

import tensorrt_rtx_bindings as trt

ROWS, WIDTH = 4096, 1024


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.lines = []

    def log(self, severity, msg):
        self.lines.append(msg)

    def number(self, pattern):
        found = [re.search(pattern, line) for line in self.lines]
        return next((int(match[1]) for match in found if match), None)


log = Log()
builder = trt.Builder(log)
network = builder.create_network(0)
plain = trt.MatrixOperation.NONE
x, w, v = (
    network.add_input(name, trt.DataType.HALF, shape)
    for name, shape in (("x", (ROWS, WIDTH)), ("w", (WIDTH, ROWS)), ("v", (ROWS, WIDTH)))
)
scores = network.add_matrix_multiply(x, plain, w, plain).get_output(0)
sums = network.add_reduce(scores, trt.ReduceOperation.SUM, 1, True).get_output(0)
scaled = network.add_elementwise(scores, sums, trt.ElementWiseOperation.DIV).get_output(0)
network.mark_output(network.add_matrix_multiply(scaled, plain, v, plain).get_output(0))


def build(limit):
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
    log.lines.clear()
    plan = builder.build_serialized_network(network, config)
    needed = log.number(r"Max Scratch Memory: (\d+) bytes")
    requested = log.number(r"Requested size was (\d+) bytes")
    print(f"limit {limit}: scratch {needed}" if plan else f"limit {limit}: requested {requested}")
    return plan, needed, requested


print("tensorrt-rtx", trt.__version__)
_, needed, _ = build(1 << 36)
assert build(needed)[0] is not None
for limit in (needed - 1, needed * 3 // 4):
    plan, _, requested = build(limit)
    assert plan is None, "a smaller plan is made now"
    assert requested == limit, f"the message says {requested}, perhaps what is needed"
PY
"$work/venv/bin/python" "$work/workspace.py"
