# SPDX-License-Identifier: Apache-2.0
"""Train the draft transformer and the text encoder together."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pw_export.nano.captions import make_tokenizer
from pw_export.nano.data import (
    CPU,
    DRAFT_SIZE,
    TEXT_LEN,
    draw_texts,
    noise_levels,
    open_latents,
    open_pca,
    tokens,
    training_scenes,
)
from pw_export.nano.random_weights import NANO_DIT, NANO_TEXT_ENCODER
from pw_export.nano.trainable import encode_texts, velocities
from pw_export.nano.training import Recipe, train
from pw_runtime.models import TextEncoder, WanDiT, expected_shapes
from pw_runtime.types import PATCH, DitConfig, Network, TextEncoderConfig

DIT = replace(NANO_DIT, text_len=TEXT_LEN, ffn_dim=768)  # keeps all weights together below 24 MB
TEXT_ENCODER = replace(NANO_TEXT_ENCODER, vocab_size=make_tokenizer().get_vocab_size())
SCENES = 24_000
BATCH = 48
SHIFT = 3.0  # shift of the noise levels in training
# Layers that add to the residual stream or to the time embedding start at zero.
ZERO_INIT = re.compile(r"\.o\.|ffn\.2\.|zero_layers\.|dt_proj\.2\.|dt_embedding\.2\.")
RECIPE = Recipe(steps=2400, matrix_lr=0.006, other_lr=2e-3)


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
    work: Path, recipe: Recipe = RECIPE, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Train, or continue a training; return the averaged weights of `TextToLatent`."""
    pca, scenes, tokenizer = open_pca(work), training_scenes(SCENES), make_tokenizer()
    latents = open_latents(work, pca, DRAFT_SIZE, scenes)
    model = TextToLatent(DIT, TEXT_ENCODER).to(device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        indices = torch.randint(SCENES, (BATCH,), generator=generator)
        clean = latents[indices].to(device, torch.float32)
        texts = draw_texts([scenes[int(i)] for i in indices], generator)
        contexts = encode_texts(model.text, *tokens(tokenizer, texts, device))
        noise = torch.randn(clean.shape, generator=generator).to(device)
        sigma = noise_levels(BATCH, SHIFT, generator).to(device)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        return F.mse_loss(velocities(model.dit, noisy, 1000 * sigma, contexts), noise - clean)

    return train(work, "draft", model, loss, recipe)
