# SPDX-License-Identifier: Apache-2.0
"""Random weights of the small model, for tests.

By construction the model draws soft drifting colours, whatever the prompt:

* patch embedding and head are inverses of each other, and in between the attention of the first
  block subtracts more than the mean of a neighbourhood: rough noise decays, smooth noise grows;
* every VAE convolution smooths in space, and mixes channels at random or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from pw_export.nano.checkpoint import (
    SPECIAL_TOKENS,
    NanoTensors,
    Tensors,
    write_checkpoint,
    write_tokenizer,
)
from pw_export.wan22_configs import LATENT_MEAN, LATENT_STD
from pw_runtime.checkpoint import keymaps
from pw_runtime.models import expected_shapes
from pw_runtime.types import PATCH, DitConfig, TextEncoderConfig, VaeConfig

Shape = tuple[int, ...]

_CONSTANT = 4.0  # rms of the constant part of a token; that of a patch of noise is 1
NANO_DIT = DitConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=4, text_dim=64)
NANO_HIGHRES = replace(NANO_DIT, has_dt=True, adapter_dim=64, control_blocks=(1,))
NANO_VAE = VaeConfig(
    z_dim=48,
    encoder_dims=(16, 16, 32, 64, 64),
    decoder_dims=(128, 128, 128, 64, 32),
    encoder_blocks=2,
    decoder_blocks=3,
    temporal_downsample=(False, True, True),
    latent_mean=LATENT_MEAN,
    latent_std=LATENT_STD,
)
NANO_TEXT_ENCODER = TextEncoderConfig(
    vocab_size=len(SPECIAL_TOKENS) + 256,
    dim=64,
    attention_dim=64,
    ffn_dim=128,
    num_heads=4,
    num_layers=2,
)


def write_nano_checkpoint(
    out: Path,
    seed: int = 0,
    *,
    dit: DitConfig = NANO_DIT,
    highres: DitConfig = NANO_HIGHRES,
    vae: VaeConfig = NANO_VAE,
    text_encoder: TextEncoderConfig = NANO_TEXT_ENCODER,
) -> None:
    """Write a checkpoint in the layout of Wan2.2-TI2V-5B, and pixelwizard/highres.pt beside it.

    The same arguments give the same bytes. All tensors are fp32.

    Raises BadRequest when `out` exists, WriteFailed when the disk is full or fails.
    """
    write_checkpoint(
        out,
        dit,
        NanoTensors(
            draft=_dit(dit, _generator(seed, 0)),
            highres=_dit(highres, _generator(seed, 1)),
            vae=_vae(vae, _generator(seed, 2)),
            text_encoder=_text_encoder(text_encoder, _generator(seed, 3)),
        ),
        _byte_tokenizer(),
    )


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 4 + stream)


def _dit(config: DitConfig, generator: torch.Generator) -> Tensors:
    shapes = expected_shapes("draft", config)
    tensors = {name: _plain(name, shape, generator, _dit_gain) for name, shape in shapes.items()}
    inputs = config.in_dim * PATCH**2
    basis = torch.randn(max(config.dim, inputs + 2), inputs + 2, generator=generator)
    basis[:, 0] = 1.0  # removed by LayerNorm; the rest of the basis is orthogonal to it
    basis = torch.linalg.qr(basis)[0][: config.dim]
    # A large constant in every token makes LayerNorm a division by that constant.
    constant, patch = _CONSTANT * math.sqrt(config.dim) * basis[:, 1], basis[:, 2:]
    unit = math.sqrt(config.dim / inputs)
    tensors["patch_embedding.bias"] = constant
    tensors["patch_embedding.weight"] = patch.reshape(shapes["patch_embedding.weight"]) * unit
    # Channels run slowest in a patch on the way in and fastest on the way out.
    head = patch.T.reshape(config.in_dim, PATCH**2, config.dim).transpose(0, 1)
    head = head.reshape(inputs, config.dim)[: config.out_dim * PATCH**2]
    tensors["head.head.weight"] = head * (1.5 * _CONSTANT / unit)
    for name in tensors:
        if name.startswith("blocks.") and name.endswith(".modulation"):
            tensors[name][:, [2, 5]] = 1.0  # the gates
        if name.endswith("cross_attn.q.weight"):
            tensors[name].zero_()  # guidance would amplify the effect of the text on the noise
    attention = "blocks.0.self_attn."
    tensors[f"{attention}v.weight"] = torch.eye(config.dim)
    mean = patch.reshape(config.dim, config.in_dim, PATCH**2).sum(-1)  # over the cells of a patch
    tensors[f"{attention}o.weight"] = (-2.6 * _CONSTANT / PATCH**2) * mean @ mean.T
    for name in ("q", "k"):
        tensors[f"{attention}{name}.weight"].zero_()
        tensors[f"{attention}{name}.bias"] = _window(config)
        tensors[f"{attention}norm_{name}.weight"].fill_(math.sqrt(2.0))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _window(config: DitConfig) -> torch.Tensor:
    """Return the query and key which, equal in all tokens, make each attend to its neighbours."""
    pairs = config.head_dim // 2
    side = pairs // 3
    along_time = pairs - 2 * side
    bias = torch.zeros(config.num_heads, pairs, 2)
    # High frequencies of the rotary embedding make a narrow window, low ones a wide one.
    for start in (1, along_time, along_time + side):
        bias[:, start : start + 3, 0] = 1.0
    return bias.flatten()


def _dit_gain(name: str) -> float:
    gains = {
        "self_attn.o.weight": 0.05,
        "cross_attn.o.weight": 0.1,
        "ffn.2.weight": 0.05,
        "time_embedding.2.weight": 0.02,
        "dt_embedding.2.weight": 0.05,
        "time_projection.1.weight": 0.05,
        "zero_layers": 0.1,
    }
    return next((gain for part, gain in gains.items() if part in name), 1.0)


def _text_encoder(config: TextEncoderConfig, generator: torch.Generator) -> Tensors:
    tensors: Tensors = {}
    for name, shape in expected_shapes("text_encoder", config).items():
        official = keymaps.text_encoder_from_transformers(name)
        assert official is not None
        tensors[official] = _plain(official, shape, generator, _text_gain)
    return tensors


def _text_gain(name: str) -> float:
    # T5 does not scale the scores of its attention down.
    return 0.3 if ".attn.q." in name or ".attn.k." in name else 1.0


def _vae(config: VaeConfig, generator: torch.Generator) -> Tensors:
    tensors: Tensors = {}
    for name, shape in expected_shapes("vae", config).items():
        tensors[name] = _plain(name, shape, generator, lambda _: 1.0)
        if len(shape) > 2 and name.endswith(".weight"):
            mix = torch.randn(shape[:2], generator=generator) / math.sqrt(shape[1])
            mix -= mix.mean(1, keepdim=True)  # SiLU makes channels positive on average
            if "resample" in name or "time_conv" in name:
                mix = torch.eye(shape[1]).repeat(shape[0] // shape[1], 1)
            elif "residual.6" in name or "middle.1.proj" in name:
                mix = 0.2 * mix
            elif name == "decoder.head.2.weight":
                mix = mix[::4].repeat_interleave(4, 0)  # four pixels of one colour
            tensors[name] = mix.reshape(*shape[:2], *[1] * (len(shape) - 2)) * _smoothing(shape[2:])
    return tensors


def _smoothing(kernel: Shape) -> torch.Tensor:
    """Return kernel weights that sum to 1: binomial in space, causal in time."""
    weights = torch.ones(())
    for axis, size in enumerate(kernel):
        taps = torch.tensor([math.comb(size - 1, k) for k in range(size)], dtype=torch.float32)
        if axis == len(kernel) - 3 and size == 3:
            taps = torch.tensor([0.0, 0.3, 0.7])  # little of the zeros before the first frame
        weights = weights[..., None] * (taps / taps.sum())
    return weights


def _plain(
    name: str, shape: Shape, generator: torch.Generator, gain: Callable[[str], float]
) -> torch.Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if "embedding.weight" in name and "patch" not in name:  # tables, not matrices
        return torch.randn(shape, generator=generator)
    if name.endswith("modulation"):
        return torch.zeros(shape)
    if name.endswith(".gamma") or len(shape) == 1:  # norms
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * gain(name) / math.sqrt(math.prod(shape[1:]))


def write_byte_tokenizer(folder: Path, text_len: int) -> None:
    """Write a tokenizer with a token per byte; every text ends with </s>."""
    write_tokenizer(folder, _byte_tokenizer(), text_len)


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    return tokenizer
