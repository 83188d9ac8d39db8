#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# OpenVINO: the plugin for CPUs replaces the signal stack of the thread that loads it by a small one.
#
# A good guess: compiling a model leaves the process's handling of signals alone.
# What happens: the first model that is compiled for "CPU" gives the calling thread an alternate signal
# stack of 8 KiB and the kernel's smallest (11,568 bytes in all on a CPU with AVX-512), in place of that
# of faulthandler, which is larger. Handlers of Python run on it, as CPython installs all of them with
# SA_ONSTACK. A service in which three signals arrived within moments was ended by a segmentation fault
# on it, and the Python stack that faulthandler printed named nothing of OpenVINO. Where another thread
# has loaded the plugin before, the calling thread's stack stays as it was.
# Whom it hurts: services in Python that several signals end (a supervisor's and a terminal's), and
# whoever uses faulthandler to find out why a process ended.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet openvino==2026.4.1 numpy==2.3.5
cat > "$work/stack.py" <<'PY'
import ctypes
import faulthandler
import platform
import sys
import threading

sys.modules["openvino_telemetry"] = None  # of no interest here
import numpy as np  # noqa: E402
import openvino  # noqa: E402
from openvino import opset13 as ops  # noqa: E402

libc = ctypes.CDLL(None)
libc.getauxval.restype = ctypes.c_ulong
frame = libc.getauxval(51)  # AT_MINSIGSTKSZ: what the kernel needs for one signal


class Stack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack():
    stack = Stack()
    assert libc.sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.sp, stack.size


faulthandler.enable()
before = signal_stack()
core = openvino.Core()
if sys.argv[1] == "thread":
    loading = threading.Thread(target=core.get_property, args=("CPU", "FULL_DEVICE_NAME"))
    loading.start()
    loading.join()
x = ops.parameter([2, 2], np.float32)
compiled = core.compile_model(openvino.Model([ops.add(x, x)], [x], "twice"), "CPU")
after = signal_stack()
print(f"  Python {platform.python_version()}, OpenVINO {openvino.__version__}")
print(f"  one frame {frame}; faulthandler's stack {before[1]} bytes, after compile_model {after[1]}")
print("  as before" if after == before else "  replaced by 8 KiB and a frame"
      if after[1] == 8192 + frame else "  replaced")
PY
printf 'compiled in the main thread:\n'
main=$("$work/venv/bin/python" "$work/stack.py" main)
printf '%s\nplugin loaded in a thread of its own before:\n' "$main"
thread=$("$work/venv/bin/python" "$work/stack.py" thread)
printf '%s\n' "$thread"
[[ $main == *"replaced by 8 KiB and a frame"* && $thread == *"as before"* ]]
