# SPDX-License-Identifier: Apache-2.0
"""A clip decoded tile by tile: what a kill leaves, what is taken up again, what is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pw_kernels import cpu_library
from pw_runtime.stages import decode_tiles
from pw_runtime.system.tile_store import state_of
from tests.e2e.pw import Ended, Pw

TALL = """
[draft]
width = 32
height = 480
steps = 2
shift = 5.0
guidance = 5.0

[highres]
width = 64
height = 960
steps = 2
shift = 5.5
guidance = 5.0

[video]
frames = 9

[decode]
strips = 4
order = "ORDER"
"""


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, tmp_path: Path) -> Callable[..., Ended]:
    def run(order: str, *arguments: object, width: int = 64) -> Ended:
        preset = tmp_path / f"{order}.toml"
        preset.write_text(TALL.replace("ORDER", order).replace("64", str(width)))
        return pw("generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a cat",
                  "--save-latents", "--out", tmp_path / order, *arguments)  # fmt: skip

    return run


@pytest.mark.parametrize("codec", ["h264", "ffv1"])
def test_both_orders_give_the_same_file(generate, tmp_path, codec) -> None:
    for order in ("frames", "tiles"):
        ended = generate(order, "--codec", codec)
        assert ended.code == 0, ended.err
        assert "decode 0: 9/9" in ended.err
    name = "0.mp4" if codec == "h264" else "0.mkv"
    assert (tmp_path / "tiles" / name).read_bytes() == (tmp_path / "frames" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "tiles").iterdir()) == [
        "0.json",
        "0.latents.safetensors",
        name,
    ]
    receipt = json.loads((tmp_path / "tiles" / "0.json").read_text())
    assert receipt["preset"]["decode"]["order"] == "tiles"
    assert "each through the whole clip" in receipt["plan"]["decisions"][-1]


# Counts tiles of a frame, and ends as kill -9 does after so many.
KILLED = """
import os, signal, sys
from pw_kernels import cpu_library
from pw_runtime.stages import decode_tiles
from pw_runtime.cli import main as cli
tile, left = decode_tiles.Bands.tile, [int(os.environ["PW_TEST_TILES"])]
def counted(self, index, t, x):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    print("tile", index, t, file=sys.stderr)
    return tile(self, index, t, x)
decode_tiles.Bands.tile = counted
cli.main()
"""


def started(tiles: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "PW_TEST_TILES": str(tiles)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_after_every_kill_the_decode_goes_on_where_it_was(generate, bundle_dir, tmp_path) -> None:
    """Twelve tiles of a frame in all; no kill costs more than the band that it hit."""
    assert generate("tiles").code == 0
    latents = tmp_path / "tiles" / "0.latents.safetensors"
    wanted = (tmp_path / "tiles" / "0.mp4").read_bytes()
    out = tmp_path / "out"
    command = ("decode", latents, "--model", bundle_dir, "--out", out)
    made: list[int] = []
    for tiles in (2, 5, 8, 10):
        ended = started(tiles, *command)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert (out / "0.tiles").stat().st_size == 9 * 64 * 960 * 3 // 2
        state = state_of(out / "0.tiles")
        made.append(len(json.loads(state.read_text())["finished"]) if state.exists() else 0)
        assert not list(out.glob("0.mp4"))
    assert made == sorted(made)
    assert made[-1] >= 2
    ended = started(-1, *command)
    assert ended.returncode == 0, ended.stderr
    assert f"holds {made[-1]} of 4 tiles: going on" in ended.stderr
    assert (out / "0.mp4").read_bytes() == wanted
    assert sorted(path.name for path in out.iterdir()) == ["0.json", "0.mp4"]


def test_room_for_the_tiles_is_asked_for_before_anything_is_computed(
    generate, tmp_path, monkeypatch
) -> None:
    from pw_runtime.system import atomic_files

    # What is always left free, and enough for the latents but not for 0.8 MB of tiles.
    usage = type("Usage", (), {"free": 16 * 2**20 + 700_000})
    monkeypatch.setattr(atomic_files.shutil, "disk_usage", lambda folder: usage)
    ended = generate("tiles")
    assert ended.code == 3
    assert "not enough room in" in ended.err
    assert not list((tmp_path / "tiles").glob("0*"))


def fail_in_the_second_band(monkeypatch: pytest.MonkeyPatch) -> None:
    tile, calls = decode_tiles.Bands.tile, list[int]()

    def failing(self, index: int, t: int, x: torch.Tensor):
        calls.append(index)
        if len(calls) == 5:
            raise RuntimeError("the device is gone")
        return tile(self, index, t, x)

    monkeypatch.setattr(decode_tiles.Bands, "tile", failing)


def test_tiles_that_are_there_take_no_more_room(
    generate, pw, bundle_dir, tmp_path, monkeypatch
) -> None:
    """A decode goes on also where the disk has no room for its tiles a second time."""
    from pw_runtime.system import atomic_files

    with monkeypatch.context() as patch:
        fail_in_the_second_band(patch)
        assert generate("tiles").code == 3
    usage = type("Usage", (), {"free": 16 * 2**20 + 1000})
    monkeypatch.setattr(atomic_files.shutil, "disk_usage", lambda folder: usage)
    latents = tmp_path / "tiles" / "0.latents.safetensors"
    other = pw("decode", latents, "--model", bundle_dir, "--out", tmp_path / "other")
    assert other.code == 3
    assert "not enough room in" in other.err
    resumed = pw("decode", latents, "--model", bundle_dir)
    assert resumed.code == 0, resumed.err
    assert "holds 1 of 4 tiles: going on" in resumed.err


def test_a_decode_that_fails_keeps_finished_tiles_and_says_so(
    generate, pw, bundle_dir, tmp_path, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        fail_in_the_second_band(patch)
        ended = generate("tiles")
    assert ended.code == 3
    tiles = tmp_path / "tiles" / "0.tiles"
    assert f"its finished tiles are kept in {tiles}" in ended.err
    resumed = pw("decode", tmp_path / "tiles" / "0.latents.safetensors", "--model", bundle_dir)
    assert resumed.code == 0, resumed.err
    assert f"{tiles} holds 1 of 4 tiles: going on" in resumed.err
    assert not tiles.exists()


def test_tiles_of_other_convolutions_are_not_taken_up(
    generate, pw, bundle_dir, tmp_path, monkeypatch
) -> None:
    if reason := cpu_library.unavailable():
        pytest.skip(reason)
    with monkeypatch.context() as patch:
        fail_in_the_second_band(patch)
        assert generate("tiles", "--conv", "winograd").code == 3
    latents = tmp_path / "tiles" / "0.latents.safetensors"
    resumed = pw("decode", latents, "--model", bundle_dir, "--conv", "onednn")
    assert resumed.code == 0, resumed.err
    assert "going on" not in resumed.err


def test_tiles_of_another_number_of_threads_are_not_taken_up(
    generate, pw, bundle_dir, tmp_path, monkeypatch
) -> None:
    """It decides last bits, as the processor does: the video would be of two decodes."""
    with monkeypatch.context() as patch:
        fail_in_the_second_band(patch)
        assert generate("tiles").code == 3
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    resumed = pw("decode", tmp_path / "tiles" / "0.latents.safetensors", "--model", bundle_dir)
    assert resumed.code == 0, resumed.err
    assert "0.tiles is of another decode (threads): decoding from the start" in resumed.err
    assert "going on" not in resumed.err


@pytest.mark.parametrize("edit", [None, "latent"])
def test_tiles_made_after_a_fallback_are_gone_on_with(
    generate, pw, bundle_dir, tmp_path, monkeypatch, edit
) -> None:
    """Not those of another latent: then the clip is decoded in the bands of the plan."""
    tile, calls = decode_tiles.Bands.tile, list[int]()

    def failing(self, index: int, t: int, x: torch.Tensor):
        if len(self.rects) == 4:
            raise torch.OutOfMemoryError("not enough")
        calls.append(index)
        if len(calls) == 8:
            raise RuntimeError("the device is gone")
        return tile(self, index, t, x)

    with monkeypatch.context() as patch:
        patch.setattr(decode_tiles.Bands, "tile", failing)
        assert generate("tiles", width=128).code == 3
    tiles = tmp_path / "tiles" / "0.tiles"
    if edit:
        state = json.loads(state_of(tiles).read_text())
        state_of(tiles).write_text(json.dumps(state | {edit: "another"}))
    resumed = pw("decode", tmp_path / "tiles" / "0.latents.safetensors", "--model", bundle_dir)
    assert resumed.code == 0, resumed.err
    if edit:
        assert "is of another decode (latent, tiles, tiling)" in resumed.err
        assert "decode: 4 bands" in resumed.err
    else:
        assert f"{tiles} holds 2 of" in resumed.err
        assert "decode: 8 bands" in resumed.err


def test_a_decode_that_fails_in_its_first_tile_leaves_none(generate, tmp_path, monkeypatch) -> None:
    def failing(self, index: int, t: int, x: torch.Tensor):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(decode_tiles.Bands, "tile", failing)
    assert generate("tiles").code == 3
    assert not list((tmp_path / "tiles").glob("*.tiles*"))


def test_the_plan_tells_the_tiles_on_the_disk(pw: Pw) -> None:
    ended = pw("plan", "--preset", "4k", "--gpu-memory", "24GiB", "--host-memory", "24GiB",
               "--precision", "bf16", "--gpu", "H200")  # fmt: skip
    assert ended.code == 0, ended.err
    assert "each through the whole clip, with the past of one in memory" in ended.out
    assert "disk: 1425.1 MiB for the finished tiles of the clip that is decoded" in ended.out
    assert "cross between host and GPU in each clip" in ended.out
