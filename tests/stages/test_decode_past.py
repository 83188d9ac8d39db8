# SPDX-License-Identifier: Apache-2.0
"""A decode frame by frame that was ended goes on between two latent frames, to the same bits."""

from __future__ import annotations

import pytest
import torch

from pw_runtime.models import VaeDecoder
from pw_runtime.stages.decode import decode_frames
from pw_runtime.stages.decode_past import caches_of, past_of
from pw_runtime.types import Compat, Latent, TilingConfig
from tests.networks import TINY_VAE
from tests.oracle import golden
from tests.stages.stores import LATENT_FRAMES, Cut, InMemory, check_goes_on


class InStrips:
    """The decoder as engines divide it: strips of columns with a halo."""

    exact_tiling = "halo"

    def __init__(self, net: VaeDecoder) -> None:
        self.config, self.coarse, self.fine = net.config, net.coarse, net.fine
        self.check_weights, self.modules = net.check_weights, net.modules


@pytest.fixture(scope="module")
def decoder() -> VaeDecoder:
    weights = golden.load("vae_tiny_weights")
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    return net


def latent(rows: int, columns: int) -> Latent:
    generator = torch.Generator().manual_seed(7)
    return Latent(x=torch.randn(48, LATENT_FRAMES, rows, columns, generator=generator))


@pytest.mark.parametrize("pixels", ["rgb24", "yuv420p"])
@pytest.mark.parametrize("bands", [1, 3])
def test_bands_go_on_to_the_same_bits(decoder, bands, pixels) -> None:
    check_goes_on(decoder, latent(45, 2), TilingConfig(strips=bands), pixels)


def test_a_bf16_decoder_goes_on_to_the_same_bits(decoder) -> None:
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    net.load_state_dict(decoder.state_dict())
    check_goes_on(net.bfloat16(), latent(5, 6), TilingConfig())


def test_strips_of_engines_go_on_to_the_same_bits(decoder) -> None:
    check_goes_on(InStrips(decoder), latent(2, 23), TilingConfig(strips=2))


def test_blended_strips_go_on_to_the_same_bits(decoder) -> None:
    check_goes_on(decoder, latent(2, 12), TilingConfig(tiling="official", strips=3, overlap=2))


def test_past_frames_come_back_as_they_lie_in_memory(decoder) -> None:
    """Channels last: the tensors of a file are dense in that order, and nothing is copied."""
    log = InMemory(end=2)
    with pytest.raises(Cut):
        list(decode_frames(decoder, latent(5, 6), TilingConfig(), Compat(), log=log))
    layers = tuple(decoder.modules())
    caches = caches_of(log.past, layers)
    assert set(caches) == {"global", "band 0"}
    for cache in caches.values():
        for frames in cache.past.values():
            assert frames.is_contiguous(memory_format=torch.channels_last_3d)
    again = past_of(caches, layers)
    assert again.keys() == log.past.keys()
    assert all(again[name].data_ptr() == x.data_ptr() for name, x in log.past.items())
