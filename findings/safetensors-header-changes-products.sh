#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# safetensors with PyTorch on a CPU: the same weight in two files gives two results.
#
# A good guess: a tensor that is loaded has a value and no place, so a layer computes the same bits
# from the same weight, whichever file it came from.
# What happens: tensors are mapped, so they begin where their bytes are in the file, at any multiple of
# 8. MKL's product with one row (a timestep's embedding, the last token of a language model) depends on
# whether the weight begins at a multiple of 16. One more letter of metadata moves it.
# Whom it hurts: who compares results bit for bit after a conversion, a merge or a rewrite of metadata
# that changed no weight. `weight.clone()` lies on 64 bytes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from safetensors.torch import load_file, save_file

print("torch", torch.__version__, torch.backends.mkl.is_available() and "with MKL")
torch.manual_seed(0)
torch.set_num_threads(1)
weight, row = torch.randn(96, 96), torch.randn(1, 96)
results = {}
for letters in range(1, 33):
    save_file({"weight": weight}, "weight.safetensors", metadata={"note": "x" * letters})
    loaded = load_file("weight.safetensors")["weight"]
    assert torch.equal(loaded, weight)
    product, copied = (torch.nn.functional.linear(row, w) for w in (loaded, loaded.clone()))
    results.setdefault(loaded.data_ptr() % 16, set()).add(product.numpy().tobytes())
    assert torch.equal(copied, torch.nn.functional.linear(row, weight))
for place, found in sorted(results.items()):
    print(f"weight at {place} of 16 bytes: {len(found)} result(s)")
assert len(set().union(*results.values())) > 1, "products of one row no longer depend on alignment"
PY
