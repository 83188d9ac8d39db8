#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Triton 3.6.0, interpreter: a loop up to a run-time number raises TypeError with NumPy 2.4 and later.
#
# A good guess: the Triton that PyTorch 2.11 pins interprets a kernel on a CPU (TRITON_INTERPRET=1) with
# the NumPy that pip installs beside it; neither package bounds the other's version.
# What happens: `range(0, n, B)` with an argument n raises InterpreterError, "only 0-dimensional arrays can
# be converted to Python scalars". A scalar is an array of one element there, and NumPy 2.4 turned its
# old warning about such conversions into an error. The same kernel without a loop runs. NumPy 2.3 with
# it, and Triton 3.7.1 with NumPy 2.4, run both.
# Whom it hurts: who tests kernels on machines without a GPU, by an environment that PyTorch 2.11 pins.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
for version in 3.6.0 3.7.1; do
  "$work/venv/bin/python" -m pip install --quiet --no-deps --target "$work/triton-$version" "triton==$version"
done
"$work/venv/bin/python" -m pip install --quiet --no-deps --target "$work/numpy-2.3.5" numpy==2.3.5
cat > "$work/kernels.py" <<'PY'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def add_one(x_ptr, n, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n) + 1, mask=at < n)


@triton.jit
def add_one_in_a_loop(x_ptr, n, B: tl.constexpr):
    for start in range(0, n, B):
        at = start + tl.arange(0, B)
        tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n) + 1, mask=at < n)


def result(kernel, grid):
    x = torch.zeros(40)
    try:
        kernel[grid](x, 40, B=16)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"sum {x.sum().item():.0f}"


print(f"triton {triton.__version__}, numpy {numpy.__version__}")
print("  without a loop:", result(add_one, (3,)))
print("  in a loop:     ", result(add_one_in_a_loop, (1,)))
PY
run() { PYTHONPATH="$1" TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/kernels.py"; }
found=$(run "$work/triton-3.6.0"; run "$work/triton-3.6.0:$work/numpy-2.3.5"; run "$work/triton-3.7.1")
echo "$found"
expected="triton 3.6.0, numpy 2.4.6
  without a loop: sum 40
  in a loop:      InterpreterError: TypeError('only 0-dimensional arrays can be converted to Python scalars')
triton 3.6.0, numpy 2.3.5
  without a loop: sum 40
  in a loop:      sum 40
triton 3.7.1, numpy 2.4.6
  without a loop: sum 40
  in a loop:      sum 40"
[ "$found" = "$expected" ] || { echo "changed"; exit 1; }
