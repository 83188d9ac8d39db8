# SPDX-License-Identifier: Apache-2.0
"""The VAE against tensors of the official implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pw_kernels import unpatchify_pixels
from pw_runtime.models import VaeDecoder, VaeEncoder, expected_shapes
from pw_runtime.models.causal_cache import CausalCache
from tests.closeness import max_abs
from tests.networks import TINY_VAE
from tests.oracle import golden

TOLERANCE = 1e-5  # 21 ulp of fp32 at the largest value; the networks err by 9


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return golden.load("vae_tiny_weights")


@pytest.fixture(scope="module")
def decoder(weights: dict[str, Tensor]) -> VaeDecoder:
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    return net


def decode(decoder: VaeDecoder, z: Tensor) -> list[Tensor]:
    """Frames of each latent frame, not clamped."""
    coarse, fine = CausalCache(), CausalCache()
    chunks = [decoder.fine(decoder.coarse(frame, coarse), fine) for frame in z.split(1, dim=1)]
    return [unpatchify_pixels(blocks[None])[0] for blocks in chunks]


def test_config_names_every_tensor_of_the_checkpoint(weights) -> None:
    shapes = expected_shapes("vae", TINY_VAE)
    assert shapes == {name: tuple(x.shape) for name, x in weights.items()}


def test_streamed_decode_equals_official(decoder) -> None:
    outputs = golden.load("vae_tiny_outputs")
    chunks = decode(decoder, golden.load("vae_tiny_inputs")["z"][0])
    assert [chunk.shape[1] for chunk in chunks] == [1, 4, 4]
    assert max_abs(torch.cat(chunks, dim=1), outputs["decode_3_raw"][0]) <= TOLERANCE


def test_longer_clip_begins_with_the_shorter_one(decoder) -> None:
    z = golden.load("vae_tiny_inputs")["z"][0]
    longer, shorter = decode(decoder, z), decode(decoder, z[:, :2])
    assert all(torch.equal(a, b) for a, b in zip(longer, shorter, strict=False))


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encode_equals_official(weights, frames) -> None:
    encoder = VaeEncoder(TINY_VAE).requires_grad_(False)
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    latent = encoder(golden.load("vae_tiny_inputs")["video"][0, :, :frames])
    wanted = golden.load("vae_tiny_outputs")[f"encode_{frames}"][0]
    assert max_abs(latent, wanted) <= TOLERANCE
