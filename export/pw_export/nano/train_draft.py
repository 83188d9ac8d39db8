# SPDX-License-Identifier: Apache-2.0
"""Train the draft transformer and the text encoder together."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pw_export.nano.captions import make_tokenizer
from pw_export.nano.checkpoint import NanoTensors
from pw_export.nano.data import (
    CPU,
    DRAFT_SIZES,
    TEXT_LEN,
    draw_indices,
    draw_texts,
    noise_levels,
    odds,
    open_latents,
    open_pca,
    tokens,
    training_scenes,
)
from pw_export.nano.random_weights import NANO_DIT, NANO_TEXT_ENCODER
from pw_export.nano.scenes import SQUARE, TALL, WIDE
from pw_export.nano.trainable import encode_texts, velocities
from pw_export.nano.training import Recipe, adopt, train
from pw_runtime.checkpoint import keymaps
from pw_runtime.models import TextEncoder, WanDiT, expected_shapes
from pw_runtime.types import PATCH, DitConfig, Network, TextEncoderConfig

DIT = replace(NANO_DIT, text_len=TEXT_LEN, ffn_dim=768)
TEXT_ENCODER = replace(NANO_TEXT_ENCODER, vocab_size=make_tokenizer().get_vocab_size())
SCENES = {WIDE: 12_000, SQUARE: 2_000, TALL: 3_000}
ASPECTS = (WIDE, WIDE, WIDE, SQUARE, WIDE, WIDE, WIDE, TALL)  # of the batches of eight steps
BATCH = 48
PICTURES = 0.25  # share of clips whose first latent frame is given, without noise
SHIFT = 3.0  # shift of the noise levels in training
# Layers that add to the residual stream or to the time embedding start at zero.
ZERO_INIT = re.compile(r"\.o\.|ffn\.2\.|zero_layers\.|dt_proj\.2\.|dt_embedding\.2\.")
RECIPE = Recipe(steps=2300, matrix_lr=0.003, other_lr=9e-4, decay=1.0, seed=6)


class TextToLatent(nn.Module):
    """The draft network and the text encoder, trained together, as `dit` and `text`."""

    def __init__(self, dit: DitConfig, text_encoder: TextEncoderConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.dit = WanDiT(dit)
        self.dit.load_state_dict(initial_dit(dit, generator))
        self.text = TextEncoder(text_encoder)
        initialise_text(self.text, generator)


def initial_dit(
    config: DitConfig, generator: torch.Generator, network: Network = "draft"
) -> dict[str, Tensor]:
    """Return initial weights, with which blocks are the identity and the head returns the noise.

    The embedding maps the values of a patch to orthogonal directions, and the head maps them back.
    LayerNorm in between gives them an rms of 1, that of the noise.
    """
    tensors = {}
    for name, shape in expected_shapes(network, config).items():
        if name.endswith(".bias"):
            tensor = torch.zeros(shape)
        elif name.endswith("modulation"):
            tensor = torch.zeros(shape)
            if name.startswith("blocks."):
                tensor[:, [2, 5]] = 1.0  # the gates
        elif len(shape) == 1:
            tensor = torch.ones(shape)
        else:
            tensor = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
            if ZERO_INIT.search(name):
                tensor.zero_()
            elif "time_projection" in name:
                tensor *= 0.1
        tensors[name] = tensor
    tensors |= _through(config, generator)
    return tensors


def _through(config: DitConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a patch embedding and a head that are inverses up to scale."""
    values = config.in_dim * PATCH**2
    basis = torch.linalg.qr(torch.randn(config.dim, values, generator=generator))[0]
    scale = math.sqrt(config.dim / values)
    # Channels run slowest in a patch on the way in and fastest on the way out.
    head = basis.T.unflatten(0, (config.in_dim, PATCH**2)).transpose(0, 1).flatten(0, 1)
    embedding = basis.unflatten(1, (config.in_dim, 1, PATCH, PATCH))
    return {
        "patch_embedding.weight": (embedding * scale).contiguous(),
        "head.head.weight": (head / scale).contiguous(),
    }


def initialise_text(encoder: nn.Module, generator: torch.Generator) -> None:
    """Initialise the weights for T5's attention, which does not scale its scores down."""
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            elif "shared" in name:
                weight.normal_(generator=generator)
            else:
                gain = 0.3 if ".q." in name or ".k." in name else 1.0
                weight.normal_(std=gain / math.sqrt(weight.shape[1]), generator=generator)


def train_draft(
    work: Path,
    recipe: Recipe = RECIPE,
    device: torch.device = CPU,
    begin: NanoTensors | None = None,
) -> dict[str, Tensor]:
    """Train from random or from other weights, or continue; return the average of `TextToLatent`.

    One clip in four begins with a picture: the timestep of its first latent frame is 0.
    """
    pca, tokenizer = open_pca(work), make_tokenizer()
    scenes = {aspect: training_scenes(count, aspect) for aspect, count in SCENES.items()}
    latents = {
        aspect: open_latents(work, pca, DRAFT_SIZES[aspect], clips)
        for aspect, clips in scenes.items()
    }
    weights = {aspect: odds(clips) for aspect, clips in scenes.items()}
    model = begun_model(begin).to(device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        aspect = ASPECTS[step % len(ASPECTS)]
        indices = draw_indices(weights[aspect], BATCH, generator)
        clean = latents[aspect][indices].to(device, torch.float32)
        texts = draw_texts([scenes[aspect][int(i)] for i in indices], generator)
        contexts = encode_texts(model.text, *tokens(tokenizer, texts, device))
        return flow_loss(model.dit, clean, contexts, generator)

    return train(work, "draft", model, loss, recipe)


def flow_loss(net: WanDiT, clean: Tensor, contexts: Tensor, generator: torch.Generator) -> Tensor:
    """Compute the error of velocities, also of clips that begin with a picture."""
    count, device = len(clean), clean.device
    noise = torch.randn(clean.shape, generator=generator).to(device)
    sigma = noise_levels(count, SHIFT, generator)[:, None].repeat(1, clean.shape[2])  # [B, T]
    given = torch.rand(count, generator=generator) < PICTURES
    sigma[given, 0] = 0.0
    sigma = sigma.to(device)
    free = (sigma > 0).to(clean)[:, None, :, None, None]
    noisy = torch.lerp(clean, noise, sigma[:, None, :, None, None])
    error = velocities(net, noisy, 1000 * sigma, contexts) - (noise - clean)
    return (error * free).square().mean() / free.mean()


def begun_model(begin: NanoTensors | None) -> TextToLatent:
    """Build the networks with random weights, or with those of a checkpoint."""
    model = TextToLatent(DIT, TEXT_ENCODER)
    if begin is not None:
        adopt(model, named(model, begin))
    return model


def named(model: TextToLatent, tensors: NanoTensors) -> dict[str, Tensor]:
    """Name the weights of a checkpoint as `TextToLatent` does."""
    named = {f"dit.{name}": tensor for name, tensor in tensors.draft.items()}
    for name in model.text.state_dict():
        official = keymaps.text_encoder_from_transformers(name)
        assert official is not None
        named[f"text.{name}"] = tensors.text_encoder[official]
    return named
