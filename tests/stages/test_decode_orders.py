# SPDX-License-Identifier: Apache-2.0
"""Frame by frame or tile by tile: the same frames, and a decode that was cut short goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pw_runtime.errors import BadResult, WriteFailed
from pw_runtime.models import VaeDecoder
from pw_runtime.models.tiling import make_bands
from pw_runtime.stages import decode, decode_tiles
from pw_runtime.stages.decode import decode_frames
from pw_runtime.system import tile_store
from pw_runtime.system.tile_store import TileStore, remove_tiles, state_of
from pw_runtime.types import Compat, DecodeOrder, FrameChunk, Latent, PixelFormat, TilingConfig
from tests.networks import TINY_VAE
from tests.oracle import golden

MADE_OF = {"latent": "a", "versions": "1"}
EXACT = Compat()


@pytest.fixture(scope="module")
def decoder() -> VaeDecoder:
    weights = golden.load("vae_tiny_weights")
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    return net


class InStrips:
    """The decoder as engines divide it: strips of columns with a halo."""

    exact_tiling = "halo"

    def __init__(self, net: VaeDecoder) -> None:
        self.config, self.coarse, self.fine = net.config, net.coarse, net.fine
        self.check_weights = net.check_weights


def latent(rows: int, columns: int, frames: int = 3) -> Latent:
    generator = torch.Generator().manual_seed(7)
    return Latent(x=torch.randn(48, frames, rows, columns, generator=generator))


def tiled(strips: int, order: DecodeOrder, tiling: str = "exact") -> TilingConfig:
    return TilingConfig(tiling=tiling, strips=strips, order=order)  # type: ignore[arg-type]


def told_nothing(text: str) -> None:
    raise AssertionError(text)


def decoded(
    net: object,
    z: Latent,
    tiling: TilingConfig,
    folder: Path,
    pixels: PixelFormat = "yuv420p",
    compat: Compat = EXACT,
) -> list[FrameChunk]:
    store = TileStore(folder / "clip.tiles", MADE_OF, told_nothing)
    chunks = list(decode_frames(net, z, tiling, compat, pixels, store=store))
    store.close()
    remove_tiles(folder / "clip.tiles")
    return chunks


def same(ours: list[FrameChunk], theirs: list[FrameChunk]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(a.start == b.start and torch.equal(a.frames, b.frames) for a, b in pairs)


@pytest.mark.parametrize("pixels", ["rgb24", "yuv420p"])
@pytest.mark.parametrize(
    ("rows", "columns", "frames", "strips"),
    [(45, 2, 3, 3), (33, 4, 1, 2), (29, 3, 2, 5), (5, 6, 5, 2), (60, 1, 2, 4)],
)
def test_bands_in_either_order_give_the_same_bytes(
    decoder, tmp_path, rows, columns, frames, strips, pixels
) -> None:
    """Portrait and landscape, odd band heights, 1, 5 and 17 frames."""
    z = latent(rows, columns, frames)
    in_turn = decoded(decoder, z, tiled(strips, "tiles"), tmp_path, pixels)
    assert same(in_turn, decoded(decoder, z, tiled(strips, "frames"), tmp_path, pixels))
    assert sum(len(chunk.frames) for chunk in in_turn) == 4 * frames - 3


@pytest.mark.parametrize("strips", [1, 2, 3])
def test_strips_in_either_order_give_the_same_bytes(decoder, tmp_path, strips) -> None:
    net, z = InStrips(decoder), latent(2, 23)
    in_turn = decoded(net, z, tiled(strips, "tiles"), tmp_path)
    assert same(in_turn, decoded(net, z, tiled(strips, "frames"), tmp_path))


@pytest.mark.parametrize(("columns", "strips"), [(23, 3), (8, 8), (6, 2)])
@pytest.mark.parametrize("truncating", [False, True])
def test_blended_strips_in_either_order_give_the_same_bytes(
    decoder, tmp_path, columns, strips, truncating
) -> None:
    """Also strips that reach over their neighbours, of which some finish no column."""
    z, compat = latent(2, columns), Compat(truncating_uint8=truncating)
    in_turn, frames = (
        decoded(decoder, z, tiled(strips, order, "official"), tmp_path, "rgb24", compat)
        for order in ("tiles", "frames")
    )
    assert same(in_turn, frames)


def test_a_bf16_decoder_gives_the_same_bytes_in_either_order(decoder, tmp_path) -> None:
    net = VaeDecoder(TINY_VAE).requires_grad_(False)
    net.load_state_dict(decoder.state_dict())
    net, z = net.bfloat16(), latent(45, 2)
    in_turn = decoded(net, z, tiled(3, "tiles"), tmp_path)
    assert same(in_turn, decoded(net, z, tiled(3, "frames"), tmp_path))


def test_progress_adds_up_to_the_frames_of_the_clip(decoder, tmp_path) -> None:
    z, done = latent(45, 2), []
    for order in ("frames", "tiles"):
        store = TileStore(tmp_path / order, MADE_OF, told_nothing)
        plan = tiled(3, order)
        for _ in decode_frames(decoder, z, plan, Compat(), store=store, advance=done.append):
            pass
        assert sum(done) == pytest.approx(9)
        assert len(done) == 9
        done.clear()


class Cut(Exception):
    """What ends a decode in these tests."""


def cut_after(tiles: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """End the decode after so many tiles of a latent frame; return what is computed."""
    computed: list[tuple[int, int]] = []
    tile = decode_tiles.Bands.tile

    def counted(self, index: int, t: int, x: torch.Tensor):
        if len(computed) == tiles:
            raise Cut
        computed.append((index, t))
        return tile(self, index, t, x)

    monkeypatch.setattr(decode_tiles.Bands, "tile", counted)
    return computed


@pytest.mark.parametrize("cut", range(1, 15, 2))
def test_a_decode_that_was_cut_goes_on_at_its_first_unfinished_band(
    decoder, tmp_path, monkeypatch, cut
) -> None:
    """The bytes are those of a decode that was not cut, and finished bands are not touched."""
    z, plan, said = latent(75, 1), tiled(5, "tiles"), list[str]()
    bands = make_bands(75, 5, TINY_VAE)
    assert len(bands) == 5
    whole = decoded(decoder, z, plan, tmp_path)
    path = tmp_path / "cut.tiles"
    with monkeypatch.context() as patch:
        cut_after(cut, patch)
        store = TileStore(path, MADE_OF, told_nothing)
        with pytest.raises(Cut):
            list(decode_frames(decoder, z, plan, Compat(), "yuv420p", store=store))
        store.close()  # as the system does for a process that is killed
    finished = cut // 3
    before = path.read_bytes() if finished else b""
    with monkeypatch.context() as patch:
        computed = cut_after(-1, patch)
        store = TileStore(path, MADE_OF, said.append)
        chunks = list(decode_frames(decoder, z, plan, Compat(), "yuv420p", store=store))
    assert same(chunks, whole)
    assert said == ([f"{path} holds {finished} of 5 tiles: going on"] if finished else [])
    again = {index for index, _ in computed if index < finished}
    rows = bands[finished].start - (bands[min(again)].start if again else bands[finished].start)
    assert rows < 2 * 13.125 + 2 + max(band.stop - band.start for band in bands)
    complete = store._start(finished)
    assert path.read_bytes()[:complete] == before[:complete]


def test_a_finished_store_is_only_read(decoder, tmp_path, monkeypatch) -> None:
    """As after a decode whose encoder failed at the last frame."""
    z, plan, said = latent(45, 2), tiled(3, "tiles"), list[str]()
    path = tmp_path / "clip.tiles"
    store = TileStore(path, MADE_OF, told_nothing)
    whole = list(decode_frames(decoder, z, plan, Compat(), store=store))
    store.close()
    computed = cut_after(0, monkeypatch)
    again = TileStore(path, MADE_OF, said.append)
    assert same(list(decode_frames(decoder, z, plan, Compat(), store=again)), whole)
    assert not computed
    assert said == [f"{path} holds 3 of 3 tiles: going on"]


def begun(decoder: VaeDecoder, tmp_path: Path) -> tuple[Path, Iterator[FrameChunk]]:
    """Decode a clip in three bands, two of which are complete."""
    path = tmp_path / "clip.tiles"
    store = TileStore(path, MADE_OF, told_nothing)
    chunks = decode_frames(decoder, latent(45, 2), tiled(3, "tiles"), Compat(), store=store)
    next(chunks)
    return path, chunks


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged: 2 tiles"),
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: flip(path, 100), "is damaged: 2 tiles are made again"),
        (lambda path: flip(path, 16 * 2 * 45 * 4), "is damaged"),
        (lambda path: state_of(path).write_text("{"), "cannot be read"),
        (lambda path: state_of(path).write_text("[]"), "cannot be read"),
        (lambda path: state_of(path).write_bytes(b"\xff" * 9), "cannot be read"),
        (lambda path: state_of(path).write_text(" " * (2**20 + 1)), "more than"),
    ],
)
def test_a_damaged_store_is_noticed_and_made_again(decoder, tmp_path, damage, told) -> None:
    path, chunks = begun(decoder, tmp_path)
    chunks.close()
    damage(path)
    said: list[str] = []
    store = TileStore(path, MADE_OF, said.append)
    z, plan = latent(45, 2), tiled(3, "tiles")
    frames = list(decode_frames(decoder, z, plan, Compat(), store=store))
    assert any(told in text for text in said)
    assert same(frames, list(decode_frames(decoder, z, tiled(3, "frames"), Compat())))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("made_of", "z", "plan", "differs"),
    [
        ({"latent": "b", "versions": "1"}, latent(45, 2), tiled(3, "tiles"), "latent"),
        ({"latent": "a"}, latent(45, 2), tiled(3, "tiles"), "versions"),
        (MADE_OF, latent(45, 2), tiled(2, "tiles"), "tiles"),
        (MADE_OF, latent(45, 2, 2), tiled(3, "tiles"), "frames"),
    ],
)
def test_tiles_of_another_decode_are_not_taken(
    decoder, tmp_path, made_of, z, plan, differs
) -> None:
    path, chunks = begun(decoder, tmp_path)
    chunks.close()
    said: list[str] = []
    store = TileStore(path, made_of, said.append)
    frames = list(decode_frames(decoder, z, plan, Compat(), store=store))
    assert said == [f"{path} is of another decode ({differs}): decoding from the start"]
    assert same(frames, list(decode_frames(decoder, z, tiled(plan.strips, "frames"), Compat())))


def test_a_full_disk_is_met_before_anything_is_computed(decoder, tmp_path, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    computed = cut_after(0, monkeypatch)
    monkeypatch.setattr(tile_store.os, "posix_fallocate", full)
    store = TileStore(tmp_path / "clip.tiles", MADE_OF, told_nothing)
    chunks = decode_frames(decoder, latent(45, 2), tiled(3, "tiles"), Compat(), store=store)
    with pytest.raises(WriteFailed, match="No space left on device"):
        next(chunks)
    assert not computed
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_later_leaves_what_is_complete(decoder, tmp_path, monkeypatch) -> None:
    path, chunks = begun(decoder, tmp_path)

    def failing(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(tile_store.os, "pwrite", failing)
        with pytest.raises(WriteFailed, match="Input/output error"):
            list(chunks)
    said: list[str] = []
    store = TileStore(path, MADE_OF, said.append)
    list(decode_frames(decoder, latent(45, 2), tiled(3, "tiles"), Compat(), store=store))
    assert said == [f"{path} holds 2 of 3 tiles: going on"]


def test_nan_in_any_tile_is_refused(decoder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(decode, "is_finite", lambda blocks: False)
    monkeypatch.setattr(VaeDecoder, "check_weights", lambda self: None)
    store = TileStore(tmp_path / "clip.tiles", MADE_OF, told_nothing)
    with pytest.raises(BadResult):
        list(decode_frames(decoder, latent(45, 2), tiled(3, "tiles"), Compat(), store=store))
    assert not state_of(tmp_path / "clip.tiles").exists()


def test_the_order_of_tiles_takes_a_store(decoder) -> None:
    with pytest.raises(ValueError, match="store"):
        next(decode_frames(decoder, latent(45, 2), tiled(3, "tiles"), Compat()))
