# SPDX-License-Identifier: Apache-2.0
"""The networks against the classes of diffusers and transformers, a second implementation.

The golden transformers have 64-wide heads; here heads are 128 wide, as in the full model.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pw_kernels import unpatchify_pixels
from pw_runtime.checkpoint import keymaps
from pw_runtime.models import VaeDecoder, VaeEncoder, WanDiT
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.types import DitConfig
from tests.closeness import max_abs, relative_l2
from tests.networks import TINY_VAE

diffusers = pytest.importorskip("diffusers")


def randomise(module: nn.Module, seed: int) -> None:
    """Draw weights that keep activations near 1 and give every parameter an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2 and "table" not in name and "gamma" not in name:
            parameter.data = noise / parameter[0].numel() ** 0.5
        elif "norm" in name and "bias" not in name:
            parameter.data = 1 + 0.1 * noise
        else:
            parameter.data = 0.1 * noise


def test_transformer_equals_diffusers_with_full_size_heads() -> None:
    config = DitConfig(dim=256, ffn_dim=320, num_heads=2, num_layers=2, text_dim=40, text_len=12)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=48,
        out_channels=48,
        text_dim=40,
        freq_dim=256,
        ffn_dim=320,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).requires_grad_(False)
    randomise(theirs, seed=1)
    ours = WanDiT(config).requires_grad_(False)
    weights = {keymaps.dit_from_diffusers(name): x for name, x in theirs.state_dict().items()}
    ours.load_state_dict(weights)

    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(48, 3, 6, 10, generator=generator)
    text = torch.randn(7, 40, generator=generator)
    t = torch.tensor([642.0])
    v = ours(latent, ours.text_keys_values(text), ours.modulation(t), ours.positions(latent))
    padded = torch.cat((text, torch.zeros(5, 40)))[None]
    expected = theirs(latent[None], t, padded, return_dict=False)[0][0]
    # diffusers computes its sinusoids in fp32: 1.6e-5 on the golden network.
    assert max_abs(v, expected) <= 5e-5
    assert relative_l2(v, expected) <= 1e-5


@pytest.fixture(scope="module")
def their_vae() -> nn.Module:
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    ).requires_grad_(False)
    randomise(vae, seed=3)
    return vae


def our_weights(vae: nn.Module) -> dict[str, Tensor]:
    return {
        keymaps.vae_from_diffusers(name, encoder_blocks=2, decoder_blocks=3): x
        for name, x in vae.state_dict().items()
    }


CONFIG = replace(
    TINY_VAE,
    encoder_dims=(8, 8, 16, 32, 32),
    latent_mean=(0.0,) * 48,
    latent_std=(1.0,) * 48,
)


def test_vae_decode_equals_diffusers(their_vae) -> None:
    decoder, weights = VaeDecoder(CONFIG).requires_grad_(False), our_weights(their_vae)
    decoder.load_state_dict({name: weights[name] for name in decoder.state_dict()})
    z = torch.randn(48, 3, 4, 6, generator=torch.Generator().manual_seed(4))
    coarse, fine = CausalCache(), CausalCache()
    blocks = [decoder.fine(decoder.coarse(x, coarse), fine) for x in z.split(1, dim=1)]
    frames = [unpatchify_pixels(x[None])[0] for x in blocks]
    expected = their_vae.decode(z[None], return_dict=False)[0][0]
    assert max_abs(torch.cat(frames, dim=1).clamp(-1, 1), expected) <= 1e-5


def test_vae_encode_equals_diffusers(their_vae) -> None:
    encoder, weights = VaeEncoder(CONFIG).requires_grad_(False), our_weights(their_vae)
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    video = torch.rand(3, 9, 32, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1
    expected = their_vae.encode(video[None], return_dict=False)[0].mode()[0]
    assert max_abs(encoder(video), expected) <= 1e-5
