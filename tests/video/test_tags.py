# SPDX-License-Identifier: Apache-2.0
"""The metadata of a video file: any text reads back as it was, and equal clips stay equal files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import av
import pytest

from pw_runtime.job.provenance import Provenance
from pw_runtime.job.video_tags import TITLE, video_tags
from pw_runtime.presets import find_preset
from pw_runtime.stages.codecs import suffix
from pw_runtime.stages.write import write_video
from pw_runtime.types import Codec, Prompt, RunOptions, TilingConfig
from tests.video.test_write import CODECS, FPS, FRAMES, HEIGHT, WIDTH, chunked, clip

TEXTS = (
    "A big red ball.",
    'Лиса 🦊 يمشي e\u0301 in <b>snow</b> & "rain"\r\nsecond line\ttabbed; a=b',
    "x" * 100_000,  # the longest prompt
    "🦊" * 30_000,
    " leading and trailing ",
)


def provenance(text: str, **changes: object) -> Provenance:
    fields: dict[str, object] = {
        "prompt": Prompt(text, id="7", position=8),
        "negative": "",
        "preset": find_preset("nano"),
        "decode": TilingConfig(),
        "options": RunOptions(),
        "seeds": {"base": 41, "draft": 1, "highres": 2},
        "noise": {},
        "noise_file": None,
        "bundle": {"digest": "0"},
        "vae": "0" * 64,
        "engines": {},
        "notices": (),
        "seconds": {},
        "versions": {"pixelwizard-runtime": "1.2.3"},
    }
    return Provenance(**(fields | changes))  # type: ignore[arg-type]


def write(path: Path, codec: Codec, tags: dict[str, str]) -> Path:
    write_video(
        chunked(clip()), path, width=WIDTH, height=HEIGHT, frames=FRAMES, fps=FPS, codec=codec,
        tags=tags,
    )  # fmt: skip
    return path


def tags_of(path: Path) -> dict[str, str]:
    with av.open(path) as container:
        return {name.lower(): text for name, text in container.metadata.items()}


@pytest.mark.parametrize("codec", CODECS)
def test_any_prompt_reads_back_as_it_was(codec: Codec, tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        tags = video_tags(provenance(text))
        path = write(tmp_path / f"{number}{suffix(codec)}", codec, tags)
        assert tags_of(path).items() >= tags.items()
        assert tags["description"] == text
        assert json.loads(tags["comment"]) == {
            "program": "PixelWizard Runtime 1.2.3",
            "preset": "nano",
            "stage": "highres",
            "seed": 41,
            "position": 8,
            "prompt": text,
        }


def test_a_title_is_cut_visibly_and_nothing_else_is() -> None:
    tags = video_tags(provenance("y" * (TITLE + 1)))
    assert len(tags["title"]) == TITLE
    assert tags["title"].endswith("…")
    assert len(tags["description"]) == TITLE + 1
    assert video_tags(provenance("y" * TITLE))["title"] == "y" * TITLE


def test_a_nul_does_not_end_the_text(tmp_path: Path) -> None:
    tags = video_tags(provenance("before\0after"))
    read = tags_of(write(tmp_path / "a.mp4", "h264", tags))
    assert read["title"] == read["description"] == "before␀after"
    assert json.loads(read["comment"])["prompt"] == "before\0after"


@pytest.mark.parametrize("codec", CODECS)
def test_equal_frames_and_tags_give_equal_files(codec: Codec, tmp_path: Path) -> None:
    tags = video_tags(provenance(TEXTS[1]))
    ending = suffix(codec)
    first, second = (write(tmp_path / f"{n}{ending}", codec, tags).read_bytes() for n in "ab")
    assert first == second
    other = write(tmp_path / f"c{ending}", codec, video_tags(provenance("another")))
    assert first != other.read_bytes()


def test_a_preset_has_its_name_in_any_tiling_and_a_changed_one_has_none() -> None:
    preset = find_preset("nano")

    def name(**changes: object) -> str:
        tags = video_tags(provenance("a", preset=replace(preset, **changes)))
        return str(json.loads(tags["comment"])["preset"])

    assert name() == name(decode=TilingConfig(strips=2, order="tiles")) == "nano"
    assert name(video=replace(preset.video, fps=8)) == "nano --set video.fps=8"
    assert name(highres=None) == "custom"
    drafted = provenance("a", options=RunOptions(draft_only=True))
    assert json.loads(video_tags(drafted)["comment"])["stage"] == "draft"
