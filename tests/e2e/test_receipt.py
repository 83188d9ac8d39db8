# SPDX-License-Identifier: Apache-2.0
"""A receipt names the files of its clip by their digests, and the video says what it is itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import av
import pytest

from tests.e2e.pw import Ended, Pw


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path):
    def run(*arguments: object) -> Ended:
        return pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
            "--prompt", "a cat", *arguments,
        )  # fmt: skip

    return run


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_digests_of_video_and_latents_are_in_the_receipt(generate, tmp_path: Path) -> None:
    assert generate("--save-latents").code == 0
    out = tmp_path / "out"
    receipt = json.loads((out / "0.json").read_text())
    for field, name in (("video", "0.mp4"), ("latents", "0.latents.safetensors")):
        file = out / name
        expected = {"file": name, "bytes": file.stat().st_size, "sha256": sha256(file)}
        assert receipt[field] == expected
    assert receipt["tiling"]["order"] in ("frames", "tiles"), "as it ran, not auto"
    assert receipt["machine"]["threads"] == 1
    assert receipt["format"] == 2, "readers of this format may ignore the new fields"


def test_latents_that_are_not_kept_are_not_named(generate, tmp_path: Path) -> None:
    assert generate().code == 0
    assert "latents" not in json.loads((tmp_path / "out" / "0.json").read_text())


def test_a_clip_finished_from_its_latents_is_the_same_file(
    generate, pw: Pw, bundle_dir: Path, tmp_path: Path
) -> None:
    assert generate("--save-latents", "--seed", 7).code == 0
    out, again = tmp_path / "out", tmp_path / "again"
    latents = out / "0.latents.safetensors"
    assert pw("decode", latents, "--model", bundle_dir, "--out", again).code == 0
    assert sha256(again / "0.mp4") == sha256(out / "0.mp4")
    receipt = json.loads((again / "0.json").read_text())
    assert receipt["latents"]["file"] == str(latents), "it is in another folder than the clip"
    assert receipt["latents"]["sha256"] == sha256(latents)


def test_a_drawn_seed_is_told_and_is_in_receipt_and_video(generate, tmp_path: Path) -> None:
    ended = generate("--seed", -1)
    assert ended.code == 0
    receipt = json.loads((tmp_path / "out" / "0.json").read_text())
    seed = receipt["seeds"]["base"]
    assert f"--seed {seed} makes this clip again" in ended.err
    with av.open(tmp_path / "out" / "0.mp4") as container:
        comment = json.loads(container.metadata["comment"])
        title = container.metadata["title"]
    assert (comment["seed"], comment["prompt"], title) == (seed, "a cat", "a cat")
    first = sha256(tmp_path / "out" / "0.mp4")
    assert generate("--seed", seed, "--out", tmp_path / "again").code == 0
    assert sha256(tmp_path / "again" / "0.mp4") == first
