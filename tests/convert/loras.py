# SPDX-License-Identifier: Apache-2.0
"""Small random LoRAs in the layouts of their writers, and what they add to a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pw_runtime.checkpoint.bundle import Bundle, open_bundle
from pw_runtime.checkpoint.keymaps import dit_to_diffusers
from pw_runtime.checkpoint.lora import with_loras
from pw_runtime.models import expected_shapes
from pw_runtime.types import LoraFile, StageName

Tensors = dict[str, Tensor]
MODULES = (
    "blocks.0.self_attn.q",
    "blocks.1.self_attn.o",
    "blocks.1.cross_attn.k",
    "blocks.2.cross_attn.v",
    "blocks.0.ffn.0",
    "blocks.2.ffn.2",
    "text_embedding.0",
    "time_projection.1",
    "head.head",
)


@dataclass(frozen=True)
class Pair:
    """The matrices of one module and its alpha."""

    down: Tensor  # [rank, K]
    up: Tensor  # [N, rank]
    alpha: float

    @property
    def delta(self) -> Tensor:
        """What is added to the weight at scale 1."""
        return (self.up @ self.down) * (self.alpha / len(self.down))


def random_pairs(
    bundle: Bundle, seed: int = 0, modules: tuple[str, ...] = MODULES
) -> dict[str, Pair]:
    """Draw matrices of ranks 2, 4, 6 in turns, with alphas of their own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes("draft", bundle.networks.draft.config)
    pairs = {}
    for index, module in enumerate(modules):
        rows, columns = shapes[f"{module}.weight"]
        rank = 2 + 2 * (index % 3)
        pairs[module] = Pair(
            down=torch.randn(rank, columns, generator=generator) / columns**0.5,
            up=torch.randn(rows, rank, generator=generator) / 4,
            alpha=1.0 + index,
        )
    return pairs


def _diffusers(module: str) -> str:
    found = dit_to_diffusers(module)
    assert found is not None
    return found


def _flat(module: str) -> str:
    return module.replace(".", "_")


# Layout -> names of down, up and alpha of a module.
Names = Callable[[str], tuple[str, str, str]]


def _names(prefix: str, down: str, up: str, rename: Callable[[str], str] = str) -> Names:
    return lambda module: (
        f"{prefix}{rename(module)}{down}",
        f"{prefix}{rename(module)}{up}",
        f"{prefix}{rename(module)}.alpha",
    )


_AB = (".lora_A.weight", ".lora_B.weight")
_DOWN_UP = (".lora_down.weight", ".lora_up.weight")
LAYOUTS: dict[str, Names] = {
    "ComfyUI": _names("diffusion_model.", *_AB),
    "kijai": _names("diffusion_model.", *_DOWN_UP),
    "model.diffusion_model": _names("model.diffusion_model.", *_AB),
    "unet": _names("unet.", *_DOWN_UP),
    "diffusers": _names("transformer.", *_AB, _diffusers),
    "diffusers without prefix": _names("", *_AB, _diffusers),
    "PEFT": _names("base_model.model.", *_AB, _diffusers),
    "PEFT, named adapter": _names(
        "transformer.", ".lora_A.default.weight", ".lora_B.default.weight", _diffusers
    ),
    "DiffSynth": _names("", ".lora_A.default.weight", ".lora_B.default.weight"),
    "DiffSynth, pipe.dit": _names("pipe.dit.", ".lora_A.default.weight", ".lora_B.default.weight"),
    "original": _names("", *_AB),
    "lora_A without weight": _names("diffusion_model.", ".lora_A", ".lora_B"),
    "kohya": _names("lora_unet_", *_DOWN_UP, _flat),
    "kohya, double underscore": _names("lora_unet__", *_DOWN_UP, _flat),
    "kohya, dots kept": _names("lora_unet_", *_DOWN_UP, lambda x: x.replace(".", "_", 1)),
    "kohya of diffusers": _names("lora_unet_", *_DOWN_UP, lambda x: _flat(_diffusers(x))),
    "_lora.up": _names("diffusion_model.", "_lora.down.weight", "_lora.up.weight"),
    ".lora.up": _names("diffusion_model.", ".lora.down.weight", ".lora.up.weight"),
    "lora_linear_layer": _names(
        "transformer.",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
        _diffusers,
    ),
}


def tensors_in(layout: str, pairs: dict[str, Pair]) -> Tensors:
    """Name the matrices and alphas as a writer does."""
    tensors = {}
    for module, pair in pairs.items():
        down, up, alpha = LAYOUTS[layout](module)
        tensors |= {down: pair.down, up: pair.up, alpha: torch.tensor(pair.alpha)}
    return tensors


def write_lora(path: Path, tensors: Tensors, metadata: dict[str, object] | None = None) -> Path:
    """Write a file; `metadata` as diffusers writes PEFT's config."""
    texts = {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata=texts or None)
    return path


def with_lora(
    bundle: Path | Bundle,
    *files: Path | LoraFile,
    network: StageName = "draft",
) -> Bundle:
    """Open a bundle with LoRAs for one network."""
    opened = open_bundle(bundle) if isinstance(bundle, Path) else bundle
    chosen = [file if isinstance(file, LoraFile) else LoraFile(file) for file in files]
    return with_loras(opened, {network: chosen})
