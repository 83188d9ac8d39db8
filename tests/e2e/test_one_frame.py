# SPDX-License-Identifier: Apache-2.0
"""`--frames 1`: a picture, from the command line to `pw verify`, `pw decode` and `pw repro`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.pw import Ended, Pw


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, preset: Path) -> Callable[..., Ended]:
    def run(out: Path, *arguments: object) -> Ended:
        return pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", out,
            "--prompt", "a cat", *arguments,
        )  # fmt: skip

    return run


@pytest.mark.slow
def test_one_frame_is_a_picture_that_every_verb_knows(
    generate: Callable[..., Ended], pw: Pw, bundle_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "clips"
    ended = generate(out, "--frames", "1", "--save-latents", "--contact-sheet")
    assert ended.code == 0, ended.err
    assert ended.out.split() == [str(out / "0.png")]
    with Image.open(out / "0.png") as image:
        assert image.size == (192, 96)
        assert image.info["Title"] == "a cat"
    receipt = json.loads((out / "0.json").read_text())
    assert (receipt["video"]["file"], receipt["options"]["codec"]) == ("0.png", "png")

    again = generate(out, "--frames", "1", "--save-latents")
    assert "skipped" in again.err
    verified = pw("verify", out)
    assert verified.code == 0, verified.out
    assert "1 clip checked" in verified.out  # the contact sheet is none
    assert "1 frame of 192x96, png" in verified.out
    assert pw("repro", out / "0.json", "--model", bundle_dir).code == 0

    latents = out / "0.latents.safetensors"
    decoded = pw("decode", latents, "--model", bundle_dir, "--out", tmp_path / "b")
    assert decoded.code == 0, decoded.err
    assert (tmp_path / "b" / "0.png").read_bytes() == (out / "0.png").read_bytes()
    lossless = ("--codec", "ffv1", "--out", tmp_path / "c")
    assert pw("decode", latents, "--model", bundle_dir, *lossless).code == 0
    assert "no byte differs" in pw("compare", out / "0.png", tmp_path / "c" / "0.mkv").out


def test_a_codec_that_is_named_counts(generate: Callable[..., Ended], tmp_path: Path) -> None:
    ended = generate(tmp_path / "a", "--frames", "1", "--codec", "h264")
    assert ended.out.split() == [str(tmp_path / "a" / "0.mp4")]
    refused = generate(tmp_path / "b", "--codec", "png")
    assert refused.code == 2
    assert "png holds one frame" in refused.err
    refused = generate(tmp_path / "b", "--frames", "1", "--fragmented")
    assert refused.code == 2
    assert "--fragmented needs an mp4, which png does not produce" in refused.err


def test_a_picture_of_anyone_is_not_replaced(
    generate: Callable[..., Ended], pw: Pw, tmp_path: Path
) -> None:
    """A prompt's picture may lie in the output folder, with the prompt's id as its name."""
    mine = tmp_path / "0.png"
    Image.new("RGB", (64, 64)).save(mine)
    content = mine.read_bytes()
    refused = generate(tmp_path, "--frames", "1")
    assert refused.code == 2
    assert "0.png: a video without a receipt" in refused.err
    assert mine.read_bytes() == content
    assert generate(tmp_path).code == 0  # an mp4 is beside it
    assert mine.read_bytes() == content
    begun = generate(tmp_path, "--image", mine)  # it would be taken for the clip afterwards
    assert begun.code == 2
    assert "0.png has the name of a clip of prompt 0" in begun.err


def test_a_damaged_picture_or_its_damaged_receipt_is_told(
    generate: Callable[..., Ended], pw: Pw, tmp_path: Path
) -> None:
    assert generate(tmp_path, "--frames", "1").code == 0
    receipt = (tmp_path / "0.json").read_text()
    (tmp_path / "0.json").write_text(receipt[:100])
    damaged = pw("verify", tmp_path)
    assert damaged.code == 3
    assert "unreadable: 0.json" in damaged.out
    (tmp_path / "0.json").write_text(receipt)
    content = bytearray((tmp_path / "0.png").read_bytes())
    content[-100] ^= 1
    (tmp_path / "0.png").write_bytes(content)
    damaged = pw("verify", tmp_path)
    assert damaged.code == 3
    assert "altered: 0.png has SHA-256" in damaged.out


def test_a_clip_may_not_have_the_name_of_the_contact_sheet(
    pw: Pw, bundle_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "contact_sheet", "text": "a cat"}\n')
    ended = pw(
        "generate", "--model", bundle_dir, "--preset", "nano", "--prompts", tmp_path / "p.jsonl",
        "--out", tmp_path / "out", "--frames", "1", "--contact-sheet",
    )  # fmt: skip
    assert ended.code == 2
    assert "the contact sheet has the name of the clip contact_sheet" in ended.err
