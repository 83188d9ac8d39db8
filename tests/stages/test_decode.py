# SPDX-License-Identifier: Apache-2.0
"""Decode: exact strips, official strips, bytes."""

from __future__ import annotations

import pytest
import torch

from pw_kernels import pack_frames
from pw_kernels.pack_frames import pixels_of
from pw_runtime.models import VaeDecoder
from pw_runtime.models.vae_blocks import CausalCache
from pw_runtime.stages import decode as stage
from pw_runtime.tiling import exact_halo, make_strips
from pw_runtime.types import Compat, DecodePlan, Latent, PixelFormat
from tests.closeness import max_abs
from tests.models.test_vae_golden import config
from tests.oracle import golden
from tests.oracle import vae as oracle_vae


@pytest.fixture(scope="module")
def decoder() -> VaeDecoder:
    weights = golden.load("vae_tiny_weights")
    net = VaeDecoder(config()).requires_grad_(False)
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    return net


def random_latent(width: int, frames: int = 2) -> torch.Tensor:
    return torch.randn(48, frames, 2, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("strips", [2, 3, 5])
def test_exact_strips_equal_the_undivided_decode_in_fp64(decoder, strips) -> None:
    """Halo of 6 latent columns: no difference at all once rounding is out of the way."""
    net = VaeDecoder(config()).requires_grad_(False)
    net.load_state_dict(decoder.state_dict())
    net.double()
    z = random_latent(31).double()
    halo = exact_halo(net.config)
    whole = stage._exact(net, make_strips(31, 1, halo), 31, halo)
    cut = stage._exact(net, make_strips(31, strips, halo), 31, halo)
    for frame in z.split(1, dim=1):
        assert max_abs(cut(frame)[0], whole(frame)[0]) <= 1e-13


def test_a_halo_one_column_short_is_seen(decoder) -> None:
    """The guard of the test above: 5 columns do not suffice for a reach of 5.75."""
    net = VaeDecoder(config()).requires_grad_(False)
    net.load_state_dict(decoder.state_dict())
    net.double()
    z = random_latent(31, frames=1).double()
    whole = stage._exact(net, make_strips(31, 1, 5), 31, 5)(z)
    cut = stage._exact(net, make_strips(31, 2, 5), 31, 5)(z)
    assert max_abs(cut[0], whole[0]) > 1e-12


def test_reach_of_the_decoder_is_six_latent_columns() -> None:
    assert exact_halo(config()) == 6


def test_official_strips_equal_the_official_blend(decoder) -> None:
    misc = golden.load("pipeline_misc")
    z = misc["tiled_z"][0]
    blend = stage._official(decoder, make_strips(z.shape[3], 3, 3), z.shape[3], 3)
    assert max_abs(pixels_of(*blend(z)), misc["tiled_video"]) <= 1e-5
    packed = pack_frames(oracle_vae.pixel_patchify(misc["tiled_video"][None])[0], truncate=True)
    assert torch.equal(packed, misc["tiled_uint8"].permute(1, 2, 3, 0))


def test_official_strip_borders_equal_official() -> None:
    description = golden.load_json("pipeline_misc")
    for width, strips, key in ((160, 3, "tiles_2k_w160_n3"), (240, 4, "tiles_4k_w240_n4")):
        borders = [[s.first, s.last] for s in make_strips(width, strips, 3)]
        assert borders == description[key]


@pytest.mark.parametrize(
    ("width", "strips", "overlap"), [(8, 3, 3), (6, 2, 3), (8, 8, 3), (10, 3, 5), (9, 2, 0)]
)
def test_official_strips_narrower_than_their_overlap_equal_official(
    decoder, width, strips, overlap
) -> None:
    """Seen: a second strip that reached column 0 was not ramped there, unlike officially."""
    z = random_latent(width, frames=1)
    blend = stage._official(decoder, make_strips(width, strips, overlap), width, overlap)
    wanted = oracle_vae.decode_tiled(golden.load("vae_tiny_weights"), z, strips, overlap)
    assert max_abs(pixels_of(*blend(z)), wanted) <= 1e-5


def test_chunks_come_in_order_and_cover_the_clip(decoder) -> None:
    latent = Latent(x=random_latent(4, frames=3))
    pictures: dict[PixelFormat, tuple[int, ...]] = {"rgb24": (32, 64, 3), "yuv420p": (48, 64)}
    for pixel_format, picture in pictures.items():
        plan = DecodePlan(strips=2)
        chunks = list(stage.decode(latent, plan, Compat(), decoder, pixel_format))
        assert {c.pixel_format for c in chunks} == {pixel_format}
        assert [(c.start, tuple(c.frames.shape)) for c in chunks] == [
            (0, (1, *picture)),
            (1, (4, *picture)),
            (5, (4, *picture)),
        ]


def test_truncated_bytes_are_rgb(decoder) -> None:
    compat = Compat(truncating_uint8=True)
    chunks = stage.decode(Latent(x=random_latent(4)), DecodePlan(), compat, decoder, "yuv420p")
    with pytest.raises(ValueError, match="rgb24, got yuv420p"):
        next(chunks)


def test_decode_computes_a_chunk_only_when_it_is_asked_for(decoder) -> None:
    """Back-pressure: nothing runs ahead of the encoder."""
    calls: list[CausalCache] = []
    hook = decoder.decoder.head.register_forward_hook(lambda m, args, out: calls.append(args[1]))
    try:
        chunks = stage.decode(Latent(x=random_latent(4)), DecodePlan(), Compat(), decoder)
        next(chunks)
        assert len(calls) == 1
    finally:
        hook.remove()


def test_bytes_are_rounded_unless_truncation_is_asked_for() -> None:
    values = torch.tensor([-1.0, -0.9999, 0.0, 0.9999, 1.0, 2.0])
    blocks = values.view(1, 1, 1, 6).repeat(12, 1, 1, 1)
    assert pack_frames(blocks, truncate=False)[0, 0, ::2, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert pack_frames(blocks, truncate=True)[0, 0, ::2, 0].tolist() == [0, 0, 127, 254, 255, 255]
