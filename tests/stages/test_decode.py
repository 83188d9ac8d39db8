# SPDX-License-Identifier: Apache-2.0
"""Decode: exact strips, official strips, bytes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pw_bench.official import vae as oracle_vae
from pw_kernels import pack_frames
from pw_kernels.pack_frames import pixels_of
from pw_runtime.models import VaeDecoder
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.tiling import (
    band_lag,
    band_rects,
    exact_halo,
    make_bands,
    make_strips,
)
from pw_runtime.stages import decode as stage
from pw_runtime.stages.decode_tiles import HaloStrips, Tiles, make_tiles
from pw_runtime.types import Compat, Latent, PixelFormat, TilingConfig
from tests.closeness import max_abs
from tests.networks import TINY_VAE
from tests.oracle import golden
from tests.oracle.vae import pixel_patchify


@pytest.fixture(scope="module")
def decoder() -> VaeDecoder:
    weights = golden.load("vae_tiny_weights")
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    return net


def random_latent(width: int, frames: int = 2) -> torch.Tensor:
    return torch.randn(48, frames, 2, width, generator=torch.Generator().manual_seed(3))


def in_fp64(decoder: VaeDecoder) -> VaeDecoder:
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    net.load_state_dict(decoder.state_dict())
    return net.double()


def put_together(tiles: Tiles, z: torch.Tensor) -> list[torch.Tensor]:
    """Decode frame by frame; return the colours of each latent frame, tiles side by side."""
    frames = []
    for t, frame in enumerate(z.split(1, dim=1)):
        shared = tiles.shared(frame)
        parts = [tiles.tile(index, t, shared)[0] for index in range(len(tiles.rects))]
        frames.append(torch.cat(parts, dim=2 if tiles.rects[0].left == tiles.rects[-1].left else 3))
    return frames


def exact_tiles(net: VaeDecoder, z: torch.Tensor, bands: int) -> Tiles:
    kept = torch.empty_like
    return make_tiles(net, TilingConfig(strips=bands), z.shape, torch.device("cpu"), kept)


def halo_tiles(net: VaeDecoder, z: torch.Tensor, strips: int, halo: int) -> Tiles:
    cut = make_strips(z.shape[3], strips, halo)
    return HaloStrips(net, cut, z.shape[2], z.shape[1], torch.device("cpu"))


def blended(net: VaeDecoder, z: torch.Tensor, strips: int, overlap: int) -> torch.Tensor:
    """Return the colours of the first frame, [3, 1, H, W], in [-1, 1]."""
    tiling = TilingConfig(tiling="official", strips=strips, overlap=overlap)
    tiles = make_tiles(net, tiling, z.shape, torch.device("cpu"), torch.empty_like)
    parts = [tiles.tile(index, 0, z[:, :1]) for index in range(strips)]
    return torch.cat([pixels_of(*part) for part in parts if part[0].shape[-1]], dim=-1)


def tall_latent(height: int, frames: int = 3) -> torch.Tensor:
    return random_latent(height, frames).transpose(2, 3).contiguous()


@pytest.mark.parametrize(("rows", "bands"), [(31, 2), (31, 3), (23, 7), (9, 2), (9, 9), (2, 2)])
def test_exact_bands_equal_the_undivided_decode_in_fp64(decoder, rows, bands) -> None:
    """No difference at all once rounding is out of the way, however narrow the bands."""
    net, z = in_fp64(decoder), tall_latent(rows).double()
    whole, cut = (put_together(exact_tiles(net, z, n), z) for n in (1, bands))
    for one, other in zip(cut, whole, strict=True):
        assert max_abs(one, other) <= 1e-13


@pytest.mark.parametrize("pixel_format", ["rgb24", "yuv420p"])
@pytest.mark.parametrize("bands", [2, 5])
def test_frames_in_bands_are_those_of_the_undivided_decode(decoder, bands, pixel_format) -> None:
    latent = Latent(x=tall_latent(29))
    whole = stage.decode_frames(decoder, latent, TilingConfig(), Compat(), pixel_format)
    cut = stage.decode_frames(decoder, latent, TilingConfig(strips=bands), Compat(), pixel_format)
    for one, other in zip(cut, whole, strict=True):
        assert one.start == other.start
        difference = one.frames.int() - other.frames.int()
        assert difference.abs().max() <= 1  # rounded to another byte where fp32 differs
        assert difference.ne(0).float().mean() <= 1e-3


class Convolved(TorchDispatchMode):
    """Counts the results of 3x3x3 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.results = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "convolution" in str(func) and args[1].dim() == 5 and args[1].shape[3] == 3:
            self.results += out.numel()
        return out


def test_bands_convolve_no_row_twice_and_leave_nothing(decoder) -> None:
    z, results = tall_latent(60), []
    for bands in (1, 4):
        tiles = exact_tiles(decoder, z, bands)
        assert len(tiles.rects) == bands
        with Convolved() as convolved:
            put_together(tiles, z)
        results.append(convolved.results)
        assert not tiles.past
        assert not tiles._seams
    assert results[0] == results[1]


def test_bands_have_equal_results_and_are_fewer_where_rows_run_out() -> None:
    assert band_lag(TINY_VAE) == 13.125
    assert make_bands(90, 3, TINY_VAE) == (slice(0, 44), slice(44, 74), slice(74, 90))
    assert [rect.height for rect in band_rects(make_bands(90, 3, TINY_VAE), 1, TINY_VAE)] == [
        494,
        480,
        466,
    ]
    assert make_bands(9, 4, TINY_VAE) == (slice(0, 9),)


@pytest.mark.parametrize("rows", [15, 16, 31, 90, 134])
@pytest.mark.parametrize("bands", [2, 5, 8, 16, 200])
def test_no_band_gives_much_more_than_its_share(rows: int, bands: int) -> None:
    """Seen: eight bands of 90 rows became seven, the last one as high as two."""
    made = make_bands(rows, bands, TINY_VAE)
    assert made[0].start == 0
    assert made[-1].stop == rows
    heights = [rect.height / 16 for rect in band_rects(made, 1, TINY_VAE)]
    assert sum(heights) == rows
    assert max(heights) <= max(rows / bands + 2, 15 if len(made) > 1 else rows)


@pytest.mark.parametrize("strips", [2, 3, 5])
def test_strips_with_a_halo_equal_the_undivided_decode_in_fp64(decoder, strips) -> None:
    """Halo of 6 latent columns: what engines decode."""
    net, z = in_fp64(decoder), random_latent(31).double()
    halo = exact_halo(net.config)
    whole, cut = (put_together(halo_tiles(net, z, n, halo), z) for n in (1, strips))
    for one, other in zip(cut, whole, strict=True):
        assert max_abs(one, other) <= 1e-13


def test_a_halo_one_column_short_is_seen(decoder) -> None:
    """The guard of the test above: 5 columns do not suffice for a reach of 5.75."""
    net, z = in_fp64(decoder), random_latent(31, frames=1).double()
    whole, cut = (put_together(halo_tiles(net, z, n, 5), z)[0] for n in (1, 2))
    assert max_abs(cut, whole) > 1e-12


def test_reach_of_the_decoder_is_six_latent_columns() -> None:
    assert exact_halo(TINY_VAE) == 6


def test_official_strips_equal_the_official_blend(decoder) -> None:
    misc = golden.load("pipeline_misc")
    z = misc["tiled_z"][0]
    assert max_abs(blended(decoder, z, 3, 3), misc["tiled_video"]) <= 1e-5
    packed = pack_frames(pixel_patchify(misc["tiled_video"][None])[0], truncate=True)
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
    wanted = oracle_vae.decode_tiled(golden.load("vae_tiny_weights"), z, strips, overlap)
    assert max_abs(blended(decoder, z, strips, overlap), wanted) <= 1e-5


def test_chunks_come_in_order_and_cover_the_clip(decoder) -> None:
    latent = Latent(x=random_latent(4, frames=3))
    pictures: dict[PixelFormat, tuple[int, ...]] = {"rgb24": (32, 64, 3), "yuv420p": (48, 64)}
    for pixel_format, picture in pictures.items():
        plan = TilingConfig(strips=2)
        chunks = list(stage.decode_frames(decoder, latent, plan, Compat(), pixel_format))
        assert {c.pixel_format for c in chunks} == {pixel_format}
        assert [(c.start, tuple(c.frames.shape)) for c in chunks] == [
            (0, (1, *picture)),
            (1, (4, *picture)),
            (5, (4, *picture)),
        ]


def test_truncated_bytes_are_rgb(decoder) -> None:
    compat = Compat(truncating_uint8=True)
    chunks = stage.decode_frames(
        decoder, Latent(x=random_latent(4)), TilingConfig(), compat, "yuv420p"
    )
    with pytest.raises(ValueError, match="rgb24, got yuv420p"):
        next(chunks)


def test_decode_computes_a_chunk_only_when_it_is_asked_for(decoder) -> None:
    """Back-pressure: nothing runs ahead of the encoder."""
    calls: list[CausalCache] = []
    hook = decoder.decoder.head.register_forward_hook(lambda m, args, out: calls.append(args[1]))
    try:
        chunks = stage.decode_frames(decoder, Latent(x=random_latent(4)), TilingConfig(), Compat())
        next(chunks)
        assert len(calls) == 1
    finally:
        hook.remove()


def test_bytes_are_rounded_unless_truncation_is_asked_for() -> None:
    values = torch.tensor([-1.0, -0.9999, 0.0, 0.9999, 1.0, 2.0])
    blocks = values.view(1, 1, 1, 6).repeat(12, 1, 1, 1)
    assert pack_frames(blocks, truncate=False)[0, 0, ::2, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert pack_frames(blocks, truncate=True)[0, 0, ::2, 0].tolist() == [0, 0, 127, 254, 255, 255]
