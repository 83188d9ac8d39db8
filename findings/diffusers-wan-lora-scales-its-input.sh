#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# diffusers: a LoRA for Wan that is loaded twice from one dictionary is weaker the second time.
#
# A good guess: `lora_state_dict` (and `load_lora_weights`) copies a state dict before it converts it,
# as its comment says, so that one dictionary serves several pipelines, or one pipeline several times.
# What happens: for keys of ComfyUI or kohya with alpha, the matrices of cross-attention and of the
# feed-forward are multiplied by alpha / rank in place; those of self-attention are not. The second
# call multiplies them again. With alpha 1 and rank 4, three quarters of the change are gone.
# Whom it hurts: servers that read a LoRA once and load it into several pipelines, or again after
# `unload_lora_weights`; and who compares two conversions of one dictionary. Give it copies.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0
"$work/venv/bin/python" - <<'PY'
import diffusers
import torch
from diffusers.loaders import WanLoraLoaderMixin

print("diffusers", diffusers.__version__)
NAMES = {"self_attn.q": "attn1.to_q", "cross_attn.q": "attn2.to_q", "ffn.0": "ffn.net.0.proj"}
lora = {}
for name in NAMES:
    key = f"diffusion_model.blocks.0.{name}"
    lora[f"{key}.lora_down.weight"] = torch.ones(4, 8)
    lora[f"{key}.lora_up.weight"] = torch.ones(8, 4)
    lora[f"{key}.alpha"] = torch.tensor(1.0)


def changes():
    converted = WanLoraLoaderMixin.lora_state_dict(lora)
    keys = [f"transformer.blocks.0.{name}" for name in NAMES.values()]
    return [float((converted[f"{k}.lora_B.weight"] @ converted[f"{k}.lora_A.weight"])[0, 0]) for k in keys]


first, second = changes(), changes()
for name, a, b in zip(NAMES, first, second, strict=True):
    print(f"{name}: adds {a} the first time, {b} the second")
assert first == [1.0, 1.0, 1.0]
assert second == [1.0, 0.25, 0.25], "the second load is as strong as the first now"
PY
