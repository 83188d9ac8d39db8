# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in other layouts, derived from a small official one; the expected bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pw_export.convert import convert
from pw_export.wan22_configs import LATENT_MEAN, LATENT_STD
from pw_runtime.checkpoint import keymaps
from pw_runtime.checkpoint.bundle import Bundle, load_tensors

T5 = "models_t5_umt5-xxl-enc-bf16.pth"
VAE = "Wan2.2_VAE.pth"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = tuple(f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2))
INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

State = dict[str, Tensor]


def quietly(out: Path, **sources: Any) -> Bundle:
    """Convert without output."""
    return convert(out=out, say=lambda line: None, **sources)


def official_state(base: Path) -> dict[str, State]:
    """Load all tensors of an official checkpoint, the text encoder with transformers' names."""
    text = torch.load(base / T5, weights_only=True)
    return {
        "draft": {n: t for shard in SHARDS for n, t in load_file(base / shard).items()},
        "vae": torch.load(base / VAE, weights_only=True),
        "text_encoder": {str(keymaps.text_encoder_to_transformers(n)): t for n, t in text.items()},
    }


def pixelwizard_state(path: Path) -> State:
    """Load the tensors of a PixelWizard file with the names of a bundle."""
    generator = torch.load(path, weights_only=True)["generator"]
    state = {}
    for name, tensor in generator.items():
        for infix in INFIXES:
            name = name.replace(infix, "")
        state[name.removeprefix("model.")] = tensor
    return state


def holds(bundle: Bundle, network: Any, state: State) -> bool:
    """Return whether a network of the bundle has exactly these tensors: names, dtypes and bits."""
    tensors = load_tensors(bundle, network)
    return tensors.keys() == state.keys() and all(
        tensors[name].dtype == state[name].dtype and torch.equal(tensors[name], state[name])
        for name in state
    )


def write_diffusers(folder: Path, base: Path) -> Path:
    """Write the checkpoint in the diffusers layout: renamed tensors, config files."""
    state = official_state(base)
    config_json = json.loads((base / "config.json").read_text())
    heads = config_json["num_heads"]
    dit = {str(keymaps.dit_to_diffusers(name)): t for name, t in state["draft"].items()}
    vae = {str(keymaps.vae_to_diffusers(name)): t for name, t in state["vae"].items()}
    text = state["text_encoder"]
    (folder / "transformer").mkdir(parents=True)
    names = sorted(dit)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, part in parts.items():
        save_file({name: dit[name] for name in part}, folder / "transformer" / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    write_json(folder / "transformer" / INDEX, {"metadata": {}, "weight_map": weight_map})
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": config_json["dim"] // heads,
        "in_channels": config_json["in_dim"],
        "out_channels": config_json["out_dim"],
        "text_dim": text["shared.weight"].shape[1],
        **{name: config_json[name] for name in ("ffn_dim", "freq_dim", "num_layers", "eps")},
    }
    write_json(folder / "transformer" / "config.json", config)
    write_network(folder / "vae", "diffusion_pytorch_model", vae, vae_config_json(vae))
    write_network(folder / "text_encoder", "model", text, text_config_json(text))
    shutil.copytree(base / "google" / "umt5-xxl", folder / "tokenizer")
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline"})
    return folder


def write_network(folder: Path, stem: str, state: State, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(state, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: object) -> None:
    """Set fields of a JSON file; None removes a field."""
    content = json.loads(path.read_text()) | changes
    write_json(path, {name: value for name, value in content.items() if value is not None})


def edit_shard(path: Path, change: Callable[[State], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_pickle(path: Path, change: Callable[[State], object]) -> None:
    """Change the tensors of a pickled state dict."""
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


def vae_config_json(state: State) -> dict[str, Any]:
    return {
        "base_dim": state["encoder.conv_in.weight"].shape[0],
        "decoder_base_dim": state["decoder.conv_out.weight"].shape[1],
        "z_dim": state["post_quant_conv.weight"].shape[0],
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "latents_mean": list(LATENT_MEAN),
        "latents_std": list(LATENT_STD),
        "is_residual": True,
        "patch_size": 2,
    }


def text_config_json(state: State) -> dict[str, Any]:
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = state[attention + "relative_attention_bias.weight"].shape
    vocab_size, dim = state["shared.weight"].shape
    return {
        "vocab_size": vocab_size,
        "d_model": dim,
        "d_kv": state[attention + "q.weight"].shape[0] // heads,
        "d_ff": state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "num_heads": heads,
        "num_layers": 2,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    }
