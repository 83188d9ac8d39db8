# SPDX-License-Identifier: Apache-2.0
"""The seam index, on synthetic frames and on both decodes in strips."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pw_bench.clips.seams import seam_index
from pw_export.nano import NANO_VAE, random_weights
from pw_kernels.pack_frames import pixels_of
from pw_runtime.models import VaeDecoder
from pw_runtime.stages.decode_tiles import Colours, make_tiles
from pw_runtime.types import TilingConfig
from tests.closeness import max_abs


def test_step_on_a_border_is_detected_and_a_slope_is_not() -> None:
    slope = torch.arange(8.0).repeat(3, 5, 1)
    assert seam_index(slope, [4], -1) == pytest.approx(1)
    slope[..., 4:] += 1
    assert seam_index(slope, [4], -1) == pytest.approx(4)
    assert seam_index(slope.mT, [4], -2) == pytest.approx(4)


@pytest.fixture(scope="module")
def smooth() -> VaeDecoder:
    """Return the built-in decoder, whose frames are so smooth that a step shows."""
    net = VaeDecoder(NANO_VAE).requires_grad_(False)
    weights = random_weights._vae(NANO_VAE, torch.Generator().manual_seed(2))
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    return net


def latent_frame(rows: int, columns: int) -> Tensor:
    coarse = torch.randn(48, 1, rows // 2, columns // 3, generator=torch.Generator().manual_seed(1))
    size = (rows, columns)
    return F.interpolate(coarse[:, 0][None], size=size, mode="bilinear").transpose(0, 1)


def tiles_of(net: VaeDecoder, z: Tensor, tiling: TilingConfig) -> list[Colours]:
    """Decode one latent frame, [C, 1, H, W]."""
    tiles = make_tiles(net, tiling, z.shape, z.device, torch.empty_like)
    shared = tiles.shared(z)
    return [tiles.tile(index, 0, shared) for index in range(len(tiles.rects))]


def undivided(net: VaeDecoder, z: Tensor) -> Tensor:
    return pixels_of(*tiles_of(net, z, TilingConfig())[0])


def test_exact_bands_have_the_index_of_the_undivided_frame(smooth) -> None:
    z = latent_frame(60, 6)
    parts = [blocks for blocks, _ in tiles_of(smooth, z, TilingConfig(strips=3))]
    assert len(parts) == 3
    borders = [2 * parts[0].shape[2], 2 * (parts[0].shape[2] + parts[1].shape[2])]
    banded = pixels_of(torch.cat(parts, dim=2), None)
    index = seam_index(undivided(smooth, z), borders, -2)
    assert seam_index(banded, borders, -2) == pytest.approx(index, rel=1e-3)


def test_official_strips_have_a_seam_that_their_blend_spreads(smooth) -> None:
    """Without overlap there is a step; with the ramp none, but other colours around it."""
    z, borders = latent_frame(6, 24), [128, 256]
    whole = undivided(smooth, z)
    index = seam_index(whole, borders, -1)
    stripes, blended = (
        torch.cat([pixels_of(*part) for part in tiles_of(smooth, z, official)], dim=-1)
        for official in (
            TilingConfig(tiling="official", strips=3, overlap=overlap) for overlap in (0, 3)
        )
    )
    assert seam_index(stripes, borders, -1) > 10 * index
    assert seam_index(blended, borders, -1) < 2 * index
    assert max_abs(blended, whole) > 0.1
