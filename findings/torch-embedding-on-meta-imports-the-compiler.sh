#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# torch: building an nn.Embedding on the meta device imports torch's compiler.
#
# A good guess: on the meta device a module is built from shapes alone, which costs nothing.
# What happens: nn.Linear does; nn.Embedding draws its values with normal_, whose meta version is
# Python that imports torch._dynamo, and with it torch._inductor, sympy and, where it is installed, triton:
# hundreds of modules, seconds of a cold start and some hundred MiB of memory.
# Whom it hurts: every program that builds a network on the meta device and then loads its weights, the
# recommended way. nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False) draws nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/modules.py" <<'PY'
import sys

import torch
from torch import nn

print("torch", torch.__version__)
with torch.device("meta"):
    for title, build in (
        ("nn.Linear", lambda: nn.Linear(8, 8)),
        ("from_pretrained", lambda: nn.Embedding.from_pretrained(torch.empty(8, 8), freeze=False)),
        ("nn.Embedding", lambda: nn.Embedding(8, 8)),
    ):
        before = len(sys.modules)
        build()
        print(f"{title}: {len(sys.modules) - before} modules imported, "
              f"torch._dynamo: {'torch._dynamo' in sys.modules}")
        if title != "nn.Embedding":
            assert "torch._dynamo" not in sys.modules
assert "torch._dynamo" in sys.modules, "the meta device draws nothing now"
PY
"$work/venv/bin/python" "$work/modules.py"
