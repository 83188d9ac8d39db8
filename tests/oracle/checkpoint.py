# SPDX-License-Identifier: Apache-2.0
"""A small random checkpoint in the official layout, with sizes chosen to catch transposed axes.

Linear weights are N(0, 1 / fan_in), so activations stay O(1) and every input matters. DiT, dt and
text values are representable in bf16 (stored wider), the adapter and the VAE are plain fp32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

Shapes = dict[str, tuple[int, ...]]
TEXT_DIM, TEXT_ATTENTION, TEXT_FFN, TEXT_HEADS, TEXT_LAYERS = 40, 48, 56, 4, 2
CONFIG: dict[str, Any] = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.33.0",
    "dim": 96,
    "eps": 1e-06,
    "ffn_dim": 208,
    "freq_dim": 256,
    "in_dim": 48,
    "model_type": "ti2v",
    "num_heads": 3,
    "num_layers": 3,
    "out_dim": 48,
    "text_len": 48,
}
ADAPTER_WIDTH = 48
CONTROLLED_BLOCK = 1
ENCODER_DIM, DECODER_DIM, LATENT = 4, 8, 48
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"&-()"
WORDS = ("a", "the", "of", "in", "on", "and", "red", "blue", "fox", "sea", "snow", "light", "slow")


@dataclass(frozen=True)
class Checkpoint:
    """Paths of the official directory and of the two PixelWizard files."""

    base: Path
    highres: Path
    draft: Path | None


def _linear(name: str, out: int, inner: int) -> Shapes:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def _conv(name: str, out: int, inner: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (out, inner, *kernel), f"{name}.bias": (out,)}


def dit_shapes() -> Shapes:
    """Return the shapes of the base DiT, with official names."""
    d, ffn, freq = CONFIG["dim"], CONFIG["ffn_dim"], CONFIG["freq_dim"]
    shapes = _conv("patch_embedding", d, CONFIG["in_dim"], 1, 2, 2)
    shapes |= _linear("text_embedding.0", d, TEXT_DIM) | _linear("text_embedding.2", d, d)
    shapes |= _linear("time_embedding.0", d, freq) | _linear("time_embedding.2", d, d)
    shapes |= _linear("time_projection.1", 6 * d, d)
    for index in range(CONFIG["num_layers"]):
        block = f"blocks.{index}"
        shapes[f"{block}.modulation"] = (1, 6, d)
        for attention in ("self_attn", "cross_attn"):
            for which in "qkvo":
                shapes |= _linear(f"{block}.{attention}.{which}", d, d)
            for which in "qk":
                shapes[f"{block}.{attention}.norm_{which}.weight"] = (d,)
        shapes |= {f"{block}.norm3.weight": (d,), f"{block}.norm3.bias": (d,)}
        shapes |= _linear(f"{block}.ffn.0", ffn, d) | _linear(f"{block}.ffn.2", d, ffn)
    shapes["head.modulation"] = (1, 2, d)
    return shapes | _linear("head.head", 4 * CONFIG["out_dim"], d)


def highres_shapes() -> Shapes:
    """Return the shapes that PixelWizard adds: dt embedding and spatial adapter."""
    d, freq = CONFIG["dim"], CONFIG["freq_dim"]
    shapes = _linear("dt_embedding.0", d, freq) | _linear("dt_embedding.2", d, d)
    backbone = "spatial_adapter.backbone"
    shapes |= _conv(f"{backbone}.0", ADAPTER_WIDTH, CONFIG["in_dim"], 1, 1, 1)
    shapes |= {f"{backbone}.1.weight": (ADAPTER_WIDTH,), f"{backbone}.1.bias": (ADAPTER_WIDTH,)}
    shapes |= _conv(f"{backbone}.3", d, ADAPTER_WIDTH, 3, 3, 3)
    norm = "spatial_adapter.feature_norm"
    shapes |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    for which in ("adapter_time_proj", "adapter_dt_proj"):
        shapes |= _linear(f"spatial_adapter.{which}.0", d, freq)
        shapes |= _linear(f"spatial_adapter.{which}.2", d, d)
    return shapes | _linear(f"spatial_adapter.zero_layers.{CONTROLLED_BLOCK}", d, d)


def text_shapes(vocabulary: int) -> Shapes:
    """Return the shapes of the UMT5 encoder, with official names."""
    d, inner = TEXT_DIM, TEXT_ATTENTION
    shapes: Shapes = {"token_embedding.weight": (vocabulary, d)}
    for index in range(TEXT_LAYERS):
        block = f"blocks.{index}"
        shapes |= {f"{block}.norm1.weight": (d,), f"{block}.norm2.weight": (d,)}
        shapes |= {f"{block}.attn.{which}.weight": (inner, d) for which in "qkv"}
        shapes[f"{block}.attn.o.weight"] = (d, inner)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (32, TEXT_HEADS)
        shapes[f"{block}.ffn.gate.0.weight"] = (TEXT_FFN, d)
        shapes[f"{block}.ffn.fc1.weight"] = (TEXT_FFN, d)
        shapes[f"{block}.ffn.fc2.weight"] = (d, TEXT_FFN)
    return shapes | {"norm.weight": (d,)}


def _residual(name: str, inner: int, out: int) -> Shapes:
    shapes: Shapes = {f"{name}.residual.0.gamma": (inner, 1, 1, 1)}
    shapes |= _conv(f"{name}.residual.2", out, inner, 3, 3, 3)
    shapes |= {f"{name}.residual.3.gamma": (out, 1, 1, 1)}
    shapes |= _conv(f"{name}.residual.6", out, out, 3, 3, 3)
    return shapes if inner == out else shapes | _conv(f"{name}.shortcut", out, inner, 1, 1, 1)


def _middle(name: str, width: int) -> Shapes:
    shapes = _residual(f"{name}.0", width, width) | _residual(f"{name}.2", width, width)
    shapes[f"{name}.1.norm.gamma"] = (width, 1, 1)
    shapes |= _conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
    return shapes | _conv(f"{name}.1.proj", width, width, 1, 1)


def _vae_half(half: str, widths: list[int], blocks: int, temporal: list[bool]) -> Shapes:
    """Return the shapes of encoder or decoder, for as many stages as `widths` has steps."""
    up = half == "decoder"
    sampler = "upsamples" if up else "downsamples"
    first, last = (LATENT, 12) if up else (12, 2 * LATENT)
    shapes = _conv(f"{half}.conv1", widths[0], first, 3, 3, 3)
    for stage, (inner, out) in enumerate(pairwise(widths)):
        name = f"{half}.{sampler}.{stage}.{sampler}"
        for index in range(blocks):
            shapes |= _residual(f"{name}.{index}", out if index else inner, out)
        if stage < len(temporal):
            shapes |= _conv(f"{name}.{blocks}.resample.1", out, out, 3, 3)
        if stage < len(temporal) and temporal[stage]:
            frames = 2 * out if up else out
            shapes |= _conv(f"{name}.{blocks}.time_conv", frames, out, 3, 1, 1)
    shapes |= _middle(f"{half}.middle", widths[0] if up else widths[-1])
    shapes |= {f"{half}.head.0.gamma": (widths[-1], 1, 1, 1)}
    return shapes | _conv(f"{half}.head.2", last, widths[-1], 3, 3, 3)


def vae_shapes() -> Shapes:
    """Return the shapes of the Wan2.2 VAE, with official names."""
    encoder = [ENCODER_DIM * m for m in (1, 1, 2, 4, 4)]
    decoder = [DECODER_DIM * m for m in (4, 4, 4, 2, 1)]
    shapes = _vae_half("encoder", encoder, 2, [False, True, True])
    shapes |= _conv("conv1", 2 * LATENT, 2 * LATENT, 1, 1, 1)
    shapes |= _conv("conv2", LATENT, LATENT, 1, 1, 1)
    return shapes | _vae_half("decoder", decoder, 3, [True, True, False])


def random_state(
    shapes: Shapes, generator: torch.Generator, bf16_values: bool
) -> dict[str, Tensor]:
    """Draw every tensor: gains near 1, small biases and tables, N(0, 1 / fan_in) weights."""
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith(".bias"):
            value = 0.1 * noise
        elif name.endswith(("gamma", "norm.weight", "backbone.1.weight")) or ".norm" in name:
            value = 1 + 0.1 * noise
        elif name.endswith("modulation"):
            value = 0.2 * noise
        elif name.endswith("embedding.weight") and len(shape) == 2:
            value = noise
        else:
            value = noise / noise[0].numel() ** 0.5
        state[name] = value.bfloat16().float() if bf16_values else value
    return state


def write_tokenizer(directory: Path) -> int:
    """Write a unigram model of characters, a few words and bytes; pad 0, end 1, unknown 2."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS]
    pieces += [(character, -6.0) for character in CHARACTERS]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(directory)
    return len(pieces)


def write_dit(directory: Path, state: dict[str, Tensor]) -> None:
    """Write config.json and two shards with their index, divided inside a block."""
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    keys = sorted(state)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :]), start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in part}, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    path = directory / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2))


def wrapped(key: str) -> str:
    """Rename a key as a wrapped training run saves it: "model." and a few wrapper infixes."""
    parts = key.split(".")
    if parts[0] == "blocks":
        infix = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")[
            int(parts[1]) % 3
        ]
        parts.insert(2, infix)
    if parts[0] in ("head", "blocks"):
        parts.insert(0, "_fsdp_wrapped_module")
    return ".".join(["model", *parts])


def write_official_checkpoint(
    directory: Path, seed: int = 0, *, with_draft: bool = False
) -> Checkpoint:
    """Write base/, highres.pt and optionally draft.pt under `directory`; same seed, same files.

    Each PixelWizard file has its own DiT weights, so mixing up two of the networks shows.
    """
    base = directory / "base"
    tokenizer = base / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = write_tokenizer(tokenizer)

    text = random_state(text_shapes(vocabulary), generator, bf16_values=True)
    text = {key: value.bfloat16() for key, value in text.items()}
    torch.save(text, base / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(random_state(vae_shapes(), generator, bf16_values=False), base / "Wan2.2_VAE.pth")
    write_dit(base, random_state(dit_shapes(), generator, bf16_values=True))

    highres = random_state(dit_shapes(), generator, bf16_values=True)
    for name, tensor in random_state(highres_shapes(), generator, bf16_values=False).items():
        adapter = name.startswith("spatial_adapter.")
        highres[name] = tensor if adapter else tensor.bfloat16().float()
    highres_pt = directory / "highres.pt"
    torch.save({"generator": {wrapped(k): v for k, v in highres.items()}}, highres_pt)

    draft_pt = directory / "draft.pt" if with_draft else None
    if draft_pt is not None:
        draft = random_state(dit_shapes(), generator, bf16_values=True)
        torch.save({"generator": {wrapped(k): v for k, v in draft.items()}}, draft_pt)
    return Checkpoint(base, highres_pt, draft_pt)
