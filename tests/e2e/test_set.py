# SPDX-License-Identifier: Apache-2.0
"""`--set`, `--size`, `--frames`: the clip, its receipt and its plan have the other value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.pw import Pw


def test_a_clip_is_made_with_the_other_values(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    ended = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a cat",
        "--out", tmp_path, "--set", "highres.steps=3", "--set", "video.fps=8",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    receipt = json.loads((tmp_path / "0.json").read_text())
    assert receipt["preset"]["highres"]["steps"] == 3
    assert receipt["preset"]["video"] == {"frames": 5, "fps": 8}
    assert pw("verify", tmp_path / "0.mp4").out.startswith(
        f"{tmp_path}/0.mp4: as it should be, 5 frames of 192x96 at 8 fps"
    )


def test_a_plan_is_that_of_the_changed_preset(pw: Pw) -> None:
    budget = ("--gpu-memory", "24GiB", "--host-memory", "64GiB", "--gpu", "H200")
    plain = pw("plan", "--preset", "2k", *budget)
    shorter = pw("plan", "--preset", "2k", "--set", "video.frames=49", *budget)
    assert (plain.code, shorter.code) == (0, 0)
    assert shorter.out != plain.out


def test_faults_are_bad_input_before_anything_is_made(
    pw: Pw, bundle_dir: Path, tmp_path: Path
) -> None:
    model = ("--model", bundle_dir)
    for command in (
        ("generate", *model, "--preset", "nano", "--prompt", "a", "--out", tmp_path / "out"),
        ("plan", "--preset", "2k"),
        ("build", *model, "--preset", "nano", "--dry-run"),
    ):
        ended = pw(*command, "--set", "highres.step=5")
        assert ended.code == 2
        assert "wanted: for instance highres.steps" in ended.err
    assert not (tmp_path / "out").exists()
    ended = pw("build", *model, "--set", "highres.steps=5")
    assert ended.code == 2
    assert "--set changes a preset, and none is named" in ended.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "1400x2560"], "1376 or 1408"),
        (["--size", "1440"], "expected e.g. 1440x2560"),
        (["--size", "picture"], "needs a picture or a video"),
        (["--frames", "48"], "45 or 49"),
        (["--size", "64x64", "--set", "draft.width=64"], "--size and --set draft.width contradict"),
        (["--frames", "5", "--set", "video.frames=9"], "--frames and --set video.frames"),
    ],
)
def test_sizes_and_lengths_that_cannot_be_are_refused(
    pw: Pw, options: list[str], said: str
) -> None:
    ended = pw("plan", "--preset", "2k", *options)
    assert ended.code == 2
    assert said in ended.err


def test_the_size_of_a_picture_is_refused_where_there_are_no_prompts(
    pw: Pw, bundle_dir: Path
) -> None:
    ended = pw("build", "--model", bundle_dir, "--preset", "2k", "--size", "picture")
    assert ended.code == 2
    assert "--size picture needs prompts with pictures, and this command has none" in ended.err


def test_size_and_length_reach_the_plan(pw: Pw) -> None:
    memory = ("--gpu-memory", "24GiB", "--host-memory", "64GiB")
    ended = pw("plan", "--preset", "2k", "--size", "1920X1088", "--frames", "49", *memory)
    assert ended.out.startswith("49 frames of 1920x1088")


def test_the_picture_of_the_prompts_decides_the_size(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (150, 300)).save(tmp_path / "first.png")
    ended = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a cat",
        "--image", tmp_path / "first.png", "--size", "picture", "--out", tmp_path / "out",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    made = json.loads((tmp_path / "out" / "0.json").read_text())["preset"]
    assert (made["highres"]["width"], made["highres"]["height"]) == (96, 192)
    assert (made["draft"]["width"], made["draft"]["height"]) == (64, 96)
