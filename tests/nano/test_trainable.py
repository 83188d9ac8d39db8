# SPDX-License-Identifier: Apache-2.0
"""Training and the runtime compute the same numbers from the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pw_export.nano.captions import make_tokenizer
from pw_export.nano.data import tokens
from pw_export.nano.random_weights import NANO_DIT, NANO_TEXT_ENCODER, NANO_VAE
from pw_export.nano.train_draft import initialise_text
from pw_export.nano.trainable import encode_texts, velocities
from pw_export.nano.trainable_vae import decode_clips, encode_clips, fold_pixels, unfold_pixels
from pw_runtime.models import TextEncoder, VaeDecoder, WanDiT
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.embeddings import sinusoid
from pw_runtime.models.text_encoder import encode_tokens
from pw_runtime.models.vae import VaeEncoder
from tests.closeness import max_abs

DIT = replace(NANO_DIT, dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=12)
HIGHRES = replace(DIT, has_dt=True, adapter_dim=16, control_blocks=(1,))
VAE = replace(NANO_VAE, encoder_dims=(4, 4, 8, 8, 8), decoder_dims=(16, 16, 8, 8, 4))


def randomise(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            mean = 1.0 if weight.dim() == 1 or weight.shape[1:].numel() == 1 else 0.0
            spread = 0.1 if mean else weight[0].numel() ** -0.5
            weight.normal_(mean, spread, generator=generator)


@pytest.mark.parametrize("config", [DIT, HIGHRES], ids=["draft", "highres"])
def test_a_batch_gives_the_velocities_of_its_clips(config: object) -> None:
    assert isinstance(config, type(DIT))
    net = WanDiT(config).requires_grad_(False)
    randomise(net)
    latents, lengths = torch.randn(3, 48, 3, 4, 6), (5, 9, 12)
    t, contexts = torch.tensor([999.0, 500.0, 20.0]), torch.zeros(3, 12, 16)
    for context, length in zip(contexts, lengths, strict=True):
        context[:length] = torch.randn(length, 16)
    dt = torch.tensor([56.0, 198.0, 2.0]) if config.has_dt else None
    drafts = torch.randn(3, 48, 3, 2, 3) if config.has_dt else None
    batch = velocities(net, latents, t, contexts, dt, drafts)
    for i, length in enumerate(lengths):
        now, step = t[i : i + 1], None if dt is None else dt[i : i + 1]
        control = None
        if step is not None and drafts is not None:
            sinusoids = (sinusoid(x, config.freq_dim) for x in (now, step))
            control = net.control(net.draft_features(drafts[i]), *sinusoids)
        text = net.text_keys_values(contexts[i, :length])
        modulation, positions = net.modulation(now, step), net.positions(latents[i])
        alone = net(latents[i], text, modulation, positions, control)
        assert alone.std() > 0.1
        assert max_abs(batch[i], alone) < 1e-4


def test_a_batch_of_clips_from_pictures_has_a_timestep_for_each_frame() -> None:
    net = WanDiT(DIT).requires_grad_(False)
    randomise(net)
    latents, contexts = torch.randn(2, 48, 3, 4, 6), torch.randn(2, 12, 16)
    t = torch.tensor([[0.0, 999.0, 999.0], [300.0, 300.0, 300.0]])
    batch = velocities(net, latents, t, contexts)
    for i in range(2):
        text, positions = net.text_keys_values(contexts[i]), net.positions(latents[i])
        alone = net(latents[i], text, net.modulation(t[i]), positions)
        assert max_abs(batch[i], alone) < 1e-4
    assert max_abs(batch[1:], velocities(net, latents[1:], t[1:, 0], contexts[1:])) < 1e-4


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_whole_clips_decode_to_what_the_runtime_streams(frames: int) -> None:
    decoder = VaeDecoder(VAE).requires_grad_(False)
    randomise(decoder)
    latents = torch.randn(2, 48, frames, 2, 3)
    clips = decode_clips(decoder, latents)
    for clip, latent in zip(clips, latents, strict=True):
        coarse, fine = CausalCache(), CausalCache()
        chunks = [decoder.fine(decoder.coarse(z, coarse), fine).clone() for z in latent.split(1, 1)]
        streamed = unfold_pixels(torch.cat(chunks, dim=1)[None])[0]
        assert clip.shape == (3, 4 * frames - 3, 32, 48)
        assert max_abs(clip, streamed) < 1e-4


@pytest.mark.parametrize("frames", [1, 9])
def test_whole_clips_encode_to_what_the_runtime_streams(frames: int) -> None:
    encoder = VaeEncoder(VAE).requires_grad_(False)
    randomise(encoder)
    clips = torch.randn(2, 3, frames, 32, 48)
    for clip, latent in zip(clips, encode_clips(encoder, clips), strict=True):
        assert max_abs(latent, encoder(clip)) < 1e-4


def test_a_batch_of_texts_gives_the_contexts_of_its_texts() -> None:
    tokenizer = make_tokenizer()
    config = replace(NANO_TEXT_ENCODER, vocab_size=tokenizer.get_vocab_size())
    encoder = TextEncoder(config).requires_grad_(False)
    initialise_text(encoder, torch.Generator().manual_seed(0))
    ids, mask = tokens(tokenizer, ["a red ball rises", "at night"])
    for row, length in enumerate((5, 3)):
        context = encode_texts(encoder, ids, mask)[row]
        assert max_abs(context[:length], encode_tokens(encoder, ids[row, :length])) < 1e-5
        assert not context[length:].any()


def test_folded_pixels_are_the_encoders_own_order() -> None:
    video = torch.randn(1, 3, 2, 4, 6)
    assert torch.equal(fold_pixels(video), VaeEncoder._patchify(video[0]))
    assert torch.equal(unfold_pixels(fold_pixels(video)), video)
