# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint of the small model in the official layout, with any weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from pw_runtime.system.atomic_files import atomic_file, atomic_folder, write_tensors, write_text
from pw_runtime.types import DitConfig

Tensors = dict[str, torch.Tensor]

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoTensors:
    """Tensors of all networks, with official names."""

    draft: Tensors
    highres: Tensors
    vae: Tensors
    text_encoder: Tensors


def write_checkpoint(out: Path, dit: DitConfig, tensors: NanoTensors, tokenizer: Tokenizer) -> None:
    """Write the layout of Wan2.2-TI2V-5B, and pixelwizard/highres.pt beside it.

    Args:
        out: folder that does not exist yet.
        dit: config of the draft network.
        tensors: weights of all networks.
        tokenizer: tokenizer of the text encoder.

    Raises BadRequest when `out` exists, WriteFailed when the disk is full or fails.
    """
    highres = {f"model.{name}": tensor for name, tensor in tensors.highres.items()}
    networks = (tensors.draft, highres, tensors.vae, tensors.text_encoder)
    size = sum(tensor.nbytes for network in networks for tensor in network.values())
    with atomic_folder(out, size, print) as folder:
        _write_dit(folder, dit, tensors.draft)
        _write_pickle(folder / "Wan2.2_VAE.pth", tensors.vae)
        _write_pickle(folder / "models_t5_umt5-xxl-enc-bf16.pth", tensors.text_encoder)
        (folder / "pixelwizard").mkdir()
        _write_pickle(folder / "pixelwizard" / "highres.pt", {"generator": highres})
        (folder / "google" / "umt5-xxl").mkdir(parents=True)
        write_tokenizer(folder / "google" / "umt5-xxl", tokenizer, dit.text_len)


def _write_dit(folder: Path, config: DitConfig, tensors: Tensors) -> None:
    fields = asdict(config)
    for name in ("has_dt", "adapter_dim", "control_blocks", "text_dim"):  # not in official files
        del fields[name]
    content = {"_class_name": "WanModel", "model_type": "ti2v", **fields}
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")
    names = sorted(tensors)
    half = len(names) // 2
    weight_map: dict[str, str] = {}
    for number, shard in enumerate((names[:half], names[half:]), 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in shard})
        weight_map |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_text(
        folder / "diffusion_pytorch_model.safetensors.index.json", json.dumps(index, indent=2)
    )


def _write_pickle(path: Path, content: object) -> None:
    with atomic_file(path) as partial:
        torch.save(content, partial)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, text_len: int) -> None:
    """Write tokenizer.json and tokenizer_config.json to a folder."""
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": text_len,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
