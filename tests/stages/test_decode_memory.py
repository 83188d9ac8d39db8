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
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.vae_blocks import Upsample
from pw_runtime.planning.decode_memory import FINE_CACHES, decode_memory
from pw_runtime.stages.decode import decode_frames
from pw_runtime.types import Compat, Latent, MemoryItem, Place, TilingConfig, VaeConfig


def accounted(config: VaeConfig, rows: int, columns: int, plan: TilingConfig) -> int:
    """Peak of all tensors of a decode of three latent frames."""
    net, latent = VaeDecoder(config).requires_grad_(False), torch.empty(48, 3, rows, columns)
    no_numbers = patch("pw_runtime.stages.decode.is_finite", lambda x: True)
    with no_numbers, Ledger() as ledger:
        taps = [m.made_taps() for m in net.modules() if isinstance(m, Upsample)]
        ledger.enter([*net.parameters(), *taps], "weights")
        ledger.enter([latent], "latent")
        ledger.restart()  # taps are made of more than they are
        for chunk in decode_frames(net, Latent(x=latent), plan, Compat(), "yuv420p"):
            del chunk
    return ledger.peak["cpu"]


def peak_bytes(items: tuple[MemoryItem, ...], place: Place) -> int:
    return sum(item.bytes for item in items if item.place == place)


def predicted(config: VaeConfig, rows: int, columns: int, strips: int) -> int:
    items = decode_memory(config, frames=3, rows=rows, columns=columns, strips=strips)
    return peak_bytes(items, "device") + peak_bytes(items, "host")  # a CPU is both


@pytest.mark.parametrize("strips", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("rows", "columns"), [(90, 160), (134, 240)], ids=["2k", "4k"])
def test_the_closed_form_is_the_ledger_of_the_full_size_decoder(rows, columns, strips) -> None:
    with FakeTensorMode():
        wanted = accounted(VAE, rows, columns, TilingConfig(strips=strips))
    assert abs(predicted(VAE, rows, columns, strips) / wanted - 1) <= 0.02


@pytest.mark.parametrize("strips", [1, 3])
def test_the_closed_form_is_the_ledger_of_a_decode_that_ran(strips) -> None:
    wanted = accounted(NANO_VAE, 16, 16, TilingConfig(strips=strips))
    assert abs(predicted(NANO_VAE, 16, 16, strips) / wanted - 1) <= 0.05


def test_caches_on_the_host_leave_the_device() -> None:
    sizes = {"frames": 31, "rows": 134, "columns": 240, "strips": 8}
    on_device = decode_memory(VAE, **sizes)
    on_host = decode_memory(VAE, **sizes, caches="host")
    moved = next(one.bytes for one in on_device if one.name == FINE_CACHES)
    pinned = next(one.bytes for one in on_host if one.name == FINE_CACHES)
    assert moved <= pinned < 2 * moved  # PyTorch pins powers of two
    assert peak_bytes(on_device, "device") - peak_bytes(on_host, "device") == moved


def test_more_strips_never_take_more() -> None:
    """Seen with a halo: sixteen strips took more than one."""
    peaks = [predicted(VAE, 90, 160, strips) for strips in (1, 2, 4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True)


def test_caches_on_the_host_hold_the_same_frames() -> None:
    """Seen from a device that is not there: nothing of the past stays on it."""
    with FakeTensorMode():
        cache, frames = CausalCache(on_host=True), torch.empty(1, 8, 2, 4, 4, device="cuda:0")
        conv = torch.nn.Identity()
        cache.keep(conv, frames)
        cache.keep(conv, frames)
        assert cache.past[conv].device.type == "cpu"
        assert cache.past[conv].shape == frames.shape
