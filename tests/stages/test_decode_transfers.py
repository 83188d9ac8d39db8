# SPDX-License-Identifier: Apache-2.0
"""What crosses between host and GPU while a clip is decoded tile by tile; fake tensors, no GPU.

PyTorch copies between devices in one piece where both sides are dense and have the same order. Else
it takes a detour over memory that is not pinned, and rearranges the numbers on the CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pw_runtime.models import VaeDecoder
from pw_runtime.models.causal_cache import CausalCache, Seam
from pw_runtime.models.tiling import make_strips
from pw_runtime.stages.decode import _Clip, decode_frames
from pw_runtime.stages.decode_tiles import Bands, Colours, HaloStrips
from pw_runtime.system.tile_store import TileStore
from pw_runtime.types import Compat, Latent, TilingConfig
from tests.networks import TINY_VAE

COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Crossings(TorchDispatchMode):
    """Records source and target of every copy between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[Tensor, Tensor, bool]] = []  # source, target, waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in COPIES:
            target, source = args[:2] if func is COPIES[0] else (out, args[0])
            (unwaited,) = args[2:] or (kwargs.get("non_blocking", False),)
            if target.device != source.device:
                self.copies.append((source, target, not unwaited))
        return out


def on_host(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu")


def in_one_piece(source: Tensor, target: Tensor) -> bool:
    laid = list(zip(source.shape, source.stride(), target.stride(), strict=True))
    dense = sum((size - 1) * stride for size, stride, _ in laid) + 1 == source.numel()
    return dense and all(ours == theirs for size, ours, theirs in laid if size > 1)


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def activations(b: int, c: int, t: int, h: int, w: int) -> Tensor:
    """Return channels-last activations on a GPU, which need not be there."""
    return torch.empty((b, t, h, w, c), device="cuda").movedim(-1, 1)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    "rows",
    [
        lambda: (
            activations(1, 8, 6, 20, 10).narrow(2, 2, 4).narrow(3, 18, 2)
        ),  # of a convolution's buffer
        lambda: activations(1, 8, 3, 20, 10).narrow(2, 2, 1).narrow(3, 18, 2),
        lambda: (
            activations(1, 8, 4, 20, 10).squeeze(0).transpose(0, 1).narrow(2, 18, 2)
        ),  # of an upsampling
        lambda: torch.cat([activations(1, 8, 4, n, 10) for n in (2, 3)], dim=3),  # of a shortcut
    ],
)
def test_rows_for_the_next_band_cross_in_one_piece(rows) -> None:
    """Also those cut from several frames, which lie apart; nothing waits for the copy.

    Cut by `narrow`: indexing a fake tensor would ask for a driver.
    """
    seam, owner, x = Seam(allocate=on_host), nn.Identity(), rows()
    with Crossings() as seen:
        seam.keep(owner, x)
        seam.keep(owner, x)
    assert [in_one_piece(source, target) for source, target, _ in seen.copies] == [True, True]
    assert not any(waits for *_, waits in seen.copies)
    assert all(target is seam.rows[owner] for _, target, _ in seen.copies)


class Shared:
    """Tiles of which only the shared part is computed."""

    rects = ()

    def __init__(self, shared: Callable[[Tensor], Tensor]) -> None:
        self.shared = shared


@pytest.mark.usefixtures("fake")
def test_what_tiles_share_is_on_the_host_before_the_cpu_cuts_it() -> None:
    frame = torch.empty(48, 1, 9, 7, device="cuda")
    tiles = Shared(lambda frame: activations(1, 8, 2, 18, 14))
    clip = _Clip(None, Latent(x=frame), tiles, "rgb24", False, print, print)  # type: ignore[arg-type]
    with Crossings() as seen:
        kept = clip._keep(frame, on_host)
    ((source, target, waits),) = seen.copies
    assert waits
    assert in_one_piece(source, target)
    assert kept is target


@pytest.mark.usefixtures("fake")
def test_the_latent_itself_stays_on_the_gpu() -> None:
    """Official strips share nothing but that, and it is there anyway."""
    frame = torch.empty(48, 1, 9, 7, device="cuda")
    clip = _Clip(None, Latent(x=frame), Shared(lambda x: x), "rgb24", False, print, print)  # type: ignore[arg-type]
    with Crossings() as seen:
        assert clip._keep(frame, on_host) is frame
    assert not seen.copies


def test_columns_of_a_strip_cross_in_one_piece() -> None:
    given: list[Tensor] = []

    class Recording:
        config = TINY_VAE

        def fine(self, x: Tensor, cache: CausalCache) -> Tensor:
            given.append(x)
            return torch.zeros(12, 1, 4 * x.shape[3], 4 * x.shape[4])

    strips = make_strips(23, 3, 6)
    tiles = HaloStrips(Recording(), strips, 2, 1, torch.device("cpu"))  # type: ignore[arg-type]
    x = torch.randn(1, 8, 2, 4, 46).contiguous(memory_format=torch.channels_last_3d)
    for index, strip in enumerate(strips):
        tiles.tile(index, 0, x)
        assert torch.equal(given[-1], x[..., 2 * strip.first : 2 * strip.last])
    assert all(part.is_contiguous(memory_format=torch.channels_last_3d) for part in given)


def test_colours_of_a_tile_are_free_before_the_next_one_is_made(tmp_path, monkeypatch) -> None:
    """Also where a decode that was cut short computes a finished tile again."""
    z = Latent(x=torch.randn(48, 3, 45, 2))
    net, plan = VaeDecoder(TINY_VAE).requires_grad_(False), TilingConfig(strips=3, order="tiles")
    tile, alive, made = Bands.tile, list[weakref.ref[Tensor]](), list[tuple[int, int]]()

    def watched(self: Bands, index: int, t: int, x: Tensor) -> Colours:
        assert all(colours() is None for colours in alive)
        colours, weight = tile(self, index, t, x)
        alive[:] = [weakref.ref(colours)]
        made.append((index, t))
        return colours, weight

    monkeypatch.setattr(Bands, "tile", watched)
    for finished in (0, 2):
        store = TileStore(tmp_path / "clip.tiles", {}, lambda text: None)
        chunks = decode_frames(net, z, plan, Compat(), store=store)
        next(chunks)
        assert store.finished == 2
        assert len(made) == 7, f"after {finished} finished tiles"
        chunks.close()
        store.close()
        made.clear()
        alive.clear()
