# SPDX-License-Identifier: Apache-2.0
"""The files of an official checkpoint, as state dicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pw_bench.official.dit import ADAPTER

TEXT_ENCODER, VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.2_VAE.pth"
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
EXTRA = ("dt_embedding.", ADAPTER)


def load_base(ckpt_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the DiT of an official directory, as stored, and its config.json."""
    index = ckpt_dir / "diffusion_pytorch_model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {path.name for path in ckpt_dir.glob("diffusion_pytorch_model*.safetensors")}
    state: dict[str, Tensor] = {}
    for name in sorted(names):
        state.update(load_file(ckpt_dir / name))
    return state, json.loads((ckpt_dir / "config.json").read_text(encoding="utf-8"))


def load_pth(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Load a plain state dict, in one dtype."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key: value.to(dtype) for key, value in state.items()}


def load_pixelwizard(path: Path) -> dict[str, Tensor]:
    """Load a PixelWizard .pt as stored, without wrapper infixes and leading "model."."""
    file = torch.load(path, map_location="cpu", weights_only=True)
    state = file.get("generator", file.get("generator_ema", file))
    clean: dict[str, Tensor] = {}
    for key, value in state.items():
        for wrapper in WRAPPERS:
            key = key.replace(wrapper, "")
        clean[key] = value
    if all(key.startswith("model.") for key in clean):
        clean = {key.removeprefix("model."): value for key, value in clean.items()}
    return clean


def check_keys(state: Mapping[str, Tensor], base: Mapping[str, Tensor], highres: bool) -> None:
    """Refuse a PixelWizard file that lacks base tensors or has unknown ones."""
    extra = {key for key in state if highres and key.startswith(EXTRA)}
    wrong = (set(state) - extra) ^ set(base)
    if wrong or (highres and not extra):
        raise ValueError(f"unexpected or missing tensors: {sorted(wrong)[:4]}, {len(extra)} extra")


def transformer_weights(state: Mapping[str, Tensor], *, bf16: bool) -> dict[str, Tensor]:
    """Cast a DiT to the dtypes it computes with: fp32, or bf16 except for the adapter."""
    low = torch.bfloat16 if bf16 else torch.float32
    return {
        key: value.to(torch.float32 if key.startswith(ADAPTER) else low)
        for key, value in state.items()
    }
