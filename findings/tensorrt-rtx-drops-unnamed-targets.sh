#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# TensorRT for RTX: a plan built without naming GPUs silently leaves out those that cannot run it.
#
# A good guess: a plan that names no compute capability is for all supported GPUs, or the build says that
# it is not. Named ones behave so: with SM80 among them, a graph in fp8 is refused.
# What happens: without named ones the same graph builds. SM80 and SM86 are taken off the list in two
# messages of the lowest severity, VERBOSE, that no usual logger shows; nothing in the plan's interface
# tells its targets, and the user of an RTX 30 finds out when it does not load.
# Whom it hurts: whoever builds plans to ship, with 8-bit or 4-bit parts. Name every target.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet \
    tensorrt-rtx-cu13-bindings==1.7.1.116 tensorrt-rtx-cu13-libs==1.7.1.116
cat > "$work/targets.py" <<'PY'
from array import array

import tensorrt_rtx_bindings as trt


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.lines = []

    def log(self, severity, msg):
        self.lines.append((severity.name, msg))


log = Log()
builder = trt.Builder(log)
network = builder.create_network(0)
one = array("f", [1.0])
x = network.add_input("x", trt.DataType.FLOAT, (64, 64))
scale = network.add_constant((), trt.Weights(trt.DataType.FLOAT, one.buffer_info()[0], 1))
scale = scale.get_output(0)
fp8 = network.add_quantize(x, scale, trt.DataType.FP8).get_output(0)
network.mark_output(network.add_dequantize(fp8, scale, trt.DataType.FLOAT).get_output(0))


def build(*targets):
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for index, name in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    log.lines.clear()
    plan = builder.build_serialized_network(network, config)
    told = {level for level, text in log.lines if "not be able to run on target" in text}
    print(f"targets {targets or 'unnamed'}: {'refused' if plan is None else 'built'}", *told)
    return plan, told


print("tensorrt-rtx", trt.__version__)
assert build("SM80", "SM89")[0] is None, "SM80 takes fp8 now"
assert build("SM89")[0] is not None
plan, told = build()
assert plan is not None, "unnamed targets are refused now"
assert told == {"VERBOSE"}, f"the dropped targets are told at {told}"
PY
"$work/venv/bin/python" "$work/targets.py"
