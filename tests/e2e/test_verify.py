# SPDX-License-Identifier: Apache-2.0
"""`pw verify`: every fault of a clip's files is named, and what is whole is called so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.pipeline import generate
from pw_runtime.presets import find_preset
from pw_runtime.prompts import make_prompts
from pw_runtime.system.progress import Reporter
from pw_runtime.types import Request, RunOptions
from tests.e2e.pw import Pw, write_preset


@pytest.fixture(scope="module")
def made(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two clips, their receipts and latents."""
    folder = tmp_path_factory.mktemp("made")
    request = Request(
        prompts=make_prompts([("a.b", "a cat"), ("c", "a dog")]),
        preset=find_preset(str(write_preset(folder / "small.toml"))),
        out=folder / "clips",
        options=RunOptions(save_latents=True),
    )
    for outcome in generate(request, open_bundle(bundle_dir), Reporter(quiet=True)):
        assert outcome.error is None
    return folder / "clips"


@pytest.fixture
def clips(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "clips"))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_folder_as_it_was_made_is_fine_in_the_order_of_names(
    pw: Pw, clips: Path, bundle_dir: Path
) -> None:
    (clips / "results.json").write_text('{"of": "another program"}')
    (clips / "notes.txt").write_text("mine")
    ended = pw("verify", clips, "--model", bundle_dir)
    assert ended.code == 0, ended.out
    model, first, second, total = ended.out.splitlines()
    assert model.startswith(f"{bundle_dir}: as it should be, ")
    assert first == f"{clips}/a.b.mp4: as it should be, 5 frames of 192x96 at 24 fps, h264"
    assert second.startswith(f"{clips}/c.mp4: as it should be")
    assert total == "2 clips checked: nothing is missing or altered"


def drop_digests(receipt: dict[str, Any]) -> None:
    del receipt["video"]["sha256"], receipt["latents"], receipt["tiling"]


def test_a_receipt_of_an_earlier_version_is_checked_as_far_as_it_goes(pw: Pw, clips: Path) -> None:
    edit(clips / "c.json", drop_digests)
    ended = pw("verify", clips / "c.json")
    assert ended.code == 0
    assert "not checked: the video's digest, which receipts of earlier versions lack" in ended.out
    flip(clips / "c.mp4", (clips / "c.mp4").stat().st_size - 200)  # in the pictures
    assert pw("verify", clips / "c.mp4").code in (0, 3)  # whatever the decoder notices
    os.truncate(clips / "c.mp4", 3000)
    ended = pw("verify", clips / "c.mp4")
    assert ended.code == 3
    assert "c.mp4 has 3000 bytes" in ended.out


def swap_latents(clips: Path) -> None:
    shutil.copy(clips / "a.b.latents.safetensors", clips / "c.latents.safetensors")


def cut(clips: Path) -> None:
    os.truncate(clips / "c.mp4", 2000)


def other_container(clips: Path) -> None:
    shutil.copy(clips / "c.mp4", clips / "c.mkv")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the video": (lambda x: flip(x / "c.mp4", 5000), "altered: c.mp4 has SHA-256"),
    "a bit of its tags": (lambda x: flip(x / "c.mp4", -9), "altered: c.mp4 has SHA-256"),
    "the end of the video": (cut, "altered: c.mp4 has 2000 bytes"),
    "an empty video": (lambda x: os.truncate(x / "c.mp4", 0), "unreadable: c.mp4: "),
    "no video": (lambda x: (x / "c.mp4").unlink(), "missing: c.mp4, which the receipt names"),
    "no receipt": (lambda x: (x / "c.json").unlink(), "orphaned: c.mp4 has no receipt c.json"),
    "two videos": (other_container, "orphaned: c.mkv is not what the receipt names, c.mp4"),
    "half a receipt": (lambda x: os.truncate(x / "c.json", 99), "unreadable: c.json: not JSON"),
    "another receipt's clip": (
        lambda x: shutil.copy(x / "a.b.json", x / "c.json"),
        "orphaned: c.mp4 is not what the receipt names, a.b.mp4",
    ),
    "a later format": (
        lambda x: edit(x / "c.json", lambda receipt: receipt.update(format=3)),
        "unreadable: c.json: format 3",
    ),
    "another speed": (
        lambda x: edit(x / "c.json", lambda receipt: receipt["preset"]["video"].update(fps=12)),
        "altered: c.mp4 has 5 frames of 192x96 at 24 fps, h264, "
        "its receipt 5 frames of 192x96 at 12 fps",
    ),
    "no latents": (
        lambda x: (x / "c.latents.safetensors").unlink(),
        "missing: c.latents.safetensors, which the receipt names",
    ),
    "a bit of the latents": (
        lambda x: flip(x / "c.latents.safetensors", -1),
        "altered: c.latents.safetensors has SHA-256",
    ),
    "latents of another clip": (swap_latents, "the receipt have another prompt, seeds, noise"),
    "a path in a receipt": (
        lambda x: edit(x / "c.json", lambda receipt: receipt["video"].update(file="../c.mp4")),
        "unreadable: c.json: video.file is no name of a file",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_named_and_the_other_clip_is_fine(pw: Pw, clips: Path, name: str) -> None:
    damage, expected = FAULTS[name]
    damage(clips)
    ended = pw("verify", clips)
    assert ended.code == 3
    first, second, total = ended.out.splitlines()
    assert first.startswith(f"{clips}/a.b.mp4: as it should be")
    assert expected in second
    assert total == "2 clips checked: something is wrong with 1"
    assert ended.err == ""


def test_what_killed_runs_left_is_named(pw: Pw, clips: Path) -> None:
    (clips / ".c.mp4.4194303.partial").write_bytes(b"half")
    (clips / ".d.latents.safetensors.4194303.folder.partial").mkdir()
    (clips / "c.tiles").write_bytes(b"pixels")
    (clips / "c.steps.safetensors").write_bytes(b"state")
    (clips / "e.partial.mp4").write_bytes(b"half")
    shutil.copy(clips / "c.latents.safetensors", clips / "f.latents.safetensors")
    ended = pw("verify", clips, "--json")
    assert ended.code == 3
    report = json.loads(ended.out)
    assert report["faulty"] == 4
    faults = {Path(x["name"]).name: x["faults"] for x in report["checked"]}
    assert faults["a.b.mp4"] == []
    assert [fault["kind"] for one in faults.values() for fault in one] == ["unfinished"] * 6
    assert {name: len(one) for name, one in faults.items()} == {
        "a.b.mp4": 0,
        "c.mp4": 3,
        ".d.latents.safetensors.4194303.folder.partial": 1,
        "e.partial.mp4": 1,
        "f.latents.safetensors": 1,
    }


def test_another_bundle_and_a_damaged_one_are_named(
    pw: Pw, clips: Path, bundle_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(bundle_dir, tmp_path / "other"))
    shard = next((other / "vae").glob("*.safetensors"))
    flip(shard, -1)
    ended = pw("verify", clips / "c.mp4", "--model", other)
    assert ended.code == 3
    model, clip, _ = ended.out.splitlines()
    assert model.startswith(f"{other}: altered: {shard} was altered or damaged")
    assert "as it should be" in clip, "bundle.json still names the files that made the clip"
    edit(other / "bundle.json", lambda x: x["files"][f"vae/{shard.name}"].update(sha256="0" * 64))
    (_, clip, _) = pw("verify", clips / "c.mp4", "--model", other).out.splitlines()
    assert f"another model: made with another bundle than {other}: vae/{shard.name} differ" in clip


@pytest.mark.parametrize("argument", ["nothing.mp4", "clips", "notes.txt", ""])
def test_unusable_arguments_are_bad_input(pw: Pw, tmp_path: Path, argument: str) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    ended = pw("verify", tmp_path / argument if argument else "")
    assert ended.code == 2
    assert ended.out == ""


def test_a_clip_named_twice_is_checked_once(pw: Pw, clips: Path) -> None:
    ended = pw("verify", clips / "c.mp4", clips / "c.json", clips)
    assert ended.out.splitlines()[-1] == "2 clips checked: nothing is missing or altered"


def test_the_partial_video_of_a_run_is_named_by_itself_too(pw: Pw, tmp_path: Path) -> None:
    """As by a shell that was given clips/*.mp4."""
    partial = tmp_path / "e.partial.mp4"
    partial.write_bytes(b"half")
    ended = pw("verify", partial)
    assert ended.code == 3, ended.err
    assert "unfinished" in ended.out
    assert "Traceback" not in ended.err
