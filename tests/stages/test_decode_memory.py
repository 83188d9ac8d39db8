# SPDX-License-Identifier: Apache-2.0
"""The closed form of the decode's memory against the ledger, and where the caches lie."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pw_bench.measure.tensor_ledger import Ledger
from pw_export.nano import NANO_VAE
from pw_export.wan22_configs import VAE
from pw_runtime.models import VaeDecoder
from pw_runtime.models.tiling import make_bands
from pw_runtime.models.vae_blocks import Upsample
from pw_runtime.planning.decode_layers import SEAMS, SHARED
from pw_runtime.planning.decode_memory import (
    decode_memory,
    waiting_sizes,
    waiting_traffic,
)
from pw_runtime.stages.decode import TileStore, decode_frames
from pw_runtime.stages.decode_tiles import make_tiles
from pw_runtime.system.pinned_memory import BLOCK, PinnedMemory, pinned_bytes
from pw_runtime.types import (
    Compat,
    DecodeOrder,
    Latent,
    MemoryItem,
    Place,
    TilingConfig,
    VaeConfig,
)
from tests.stages.stores import Nowhere

_empty = torch.empty


def accounted(
    config: VaeConfig, rows: int, columns: int, plan: TilingConfig, store: TileStore | None = None
) -> int:
    """Peak of all tensors of a decode of three latent frames."""
    net, latent = VaeDecoder(config).requires_grad_(False), torch.empty(48, 3, rows, columns)
    no_numbers = patch("pw_runtime.stages.decode.is_finite", lambda x: True)
    with no_numbers, Ledger() as ledger:
        taps = [m.made_taps() for m in net.modules() if isinstance(m, Upsample)]
        ledger.enter([*net.parameters(), *taps], "weights")
        ledger.enter([latent], "latent")
        ledger.restart()  # taps are made of more than they are
        clip = Latent(x=latent)
        for chunk in decode_frames(net, clip, plan, Compat(), "yuv420p", store=store):
            del chunk
    return ledger.peak["cpu"]


def peak_bytes(items: tuple[MemoryItem, ...], place: Place) -> int:
    return sum(item.bytes for item in items if item.place == place)


def predicted(
    config: VaeConfig, rows: int, columns: int, strips: int, order: DecodeOrder = "frames"
) -> int:
    sizes = {"frames": 3, "rows": rows, "columns": columns, "strips": strips}
    items = decode_memory(config, **sizes, order=order)
    return peak_bytes(items, "device") + peak_bytes(items, "host")  # a CPU is both


@pytest.mark.parametrize("strips", [1, 8])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(90, 160), (134, 240), (240, 134)],
    ids=["2k", "4k", "4k-portrait"],
)
def test_the_closed_form_is_the_ledger_of_the_full_size_decoder(rows, columns, strips) -> None:
    with FakeTensorMode():
        wanted = accounted(VAE, rows, columns, TilingConfig(strips=strips))
    assert abs(predicted(VAE, rows, columns, strips) / wanted - 1) <= 0.02


@pytest.mark.parametrize(
    ("rows", "columns"), [(90, 160), (134, 240), (240, 134)], ids=["2k", "4k", "4k-portrait"]
)
def test_the_closed_form_is_the_ledger_tile_by_tile(rows, columns) -> None:
    """It counts the rows between bands until the end, of which the last band frees some."""
    with FakeTensorMode():
        wanted = accounted(VAE, rows, columns, TilingConfig(strips=8, order="tiles"), Nowhere())
    assert 0.98 <= predicted(VAE, rows, columns, 8, "tiles") / wanted <= 1.05


@pytest.mark.parametrize("strips", [1, 3])
def test_the_closed_form_is_the_ledger_of_a_decode_that_ran(strips) -> None:
    wanted = accounted(NANO_VAE, 16, 16, TilingConfig(strips=strips))
    assert abs(predicted(NANO_VAE, 16, 16, strips) / wanted - 1) <= 0.05


def test_tile_by_tile_4k_fits_a_card_of_24_gib_and_its_host() -> None:
    """In fp32; frame by frame it takes 65 GiB, or as much on the host."""
    sizes = {"frames": 31, "rows": 134, "columns": 240, "strips": 8}
    items = decode_memory(VAE, **sizes, order="tiles", on_gpu=True)
    assert peak_bytes(items, "device") <= 20 * 2**30
    assert peak_bytes(items, "host") <= 20 * 2**30
    bands = [band.stop - band.start for band in make_bands(134, 8, VAE)]
    waiting = waiting_sizes(VAE, 31, 134, 240, bands, 4)
    assert waiting_traffic(waiting, len(bands)) <= 300 * 2**30


def test_what_waits_on_the_host_is_what_a_decode_keeps(monkeypatch) -> None:
    """The sizes of the closed form, tensor by tensor, and in the blocks that are pinned."""
    net, z, kept = VaeDecoder(NANO_VAE).requires_grad_(False), torch.randn(48, 3, 40, 4), []

    def noted(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel() * x.element_size())
        return torch.empty_like(x)

    tiles = make_tiles(net, TilingConfig(strips=2), z.shape, torch.device("cpu"), noted)
    with torch.inference_mode():
        shared = [tiles.shared(frame) for frame in z.split(1, dim=1)]
        for t, x in enumerate(shared):
            tiles.tile(0, t, x)
    bands = [band.stop - band.start for band in make_bands(40, 2, NANO_VAE)]
    waiting = waiting_sizes(NANO_VAE, 3, 40, 4, bands, 4)
    assert sorted(waiting[SEAMS]) == sorted(kept)
    assert waiting[SHARED] == [x.numel() * 4 for x in shared]


def test_pinned_blocks_waste_little() -> None:
    """PyTorch would round each tensor up to a power of two by itself."""
    memory = PinnedMemory()
    sizes = [5 * 2**20 + 4 * n for n in range(200)]
    with patch.object(torch, "empty", lambda *a, pin_memory=False, **k: _empty(*a, **k)):
        parts = [memory.like(torch.empty(size // 4, 1)) for size in sizes[:60]]
    starts = {(part.untyped_storage().data_ptr(), part.storage_offset()) for part in parts}
    assert len(starts) == len(parts)
    assert sum(sizes) <= pinned_bytes(sizes) <= 1.3 * sum(sizes)
    assert pinned_bytes(sizes[:60]) == len({start for start, _ in starts}) * BLOCK


def test_memory_that_is_handed_out_has_the_layout_of_what_it_is_for() -> None:
    x = torch.empty(1, 8, 2, 3, 4).contiguous(memory_format=torch.channels_last_3d)
    with patch.object(torch, "empty", lambda *a, pin_memory=False, **k: _empty(*a, **k)):
        rows = PinnedMemory().like(x[:, :, :, 1:])
    assert rows.shape == (1, 8, 2, 2, 4)
    assert rows.is_contiguous(memory_format=torch.channels_last_3d)


def test_more_strips_never_take_more() -> None:
    """Seen with a halo: sixteen strips took more than one."""
    for order in ("frames", "tiles"):
        peaks = [predicted(VAE, 90, 160, strips, order) for strips in (1, 2, 4, 8)]
        assert peaks == sorted(peaks, reverse=True)
