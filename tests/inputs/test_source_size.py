# SPDX-License-Identifier: Apache-2.0
"""`--size picture`: the pictures and videos of the prompts decide the size, as they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from pw_runtime.errors import BadRequest
from pw_runtime.job.source_size import size_of_sources
from pw_runtime.presets import find_preset
from pw_runtime.sizes import Size
from pw_runtime.stages.write import write_video
from pw_runtime.types import FrameChunk, Prompt


def picture(path: Path, width: int, height: int, orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height)).save(path, exif=exif)
    return path


@pytest.mark.parametrize(
    ("orientation", "size"), [(1, (2336, 1568)), (3, (2336, 1568)), (6, (1568, 2336))]
)
def test_a_picture_decides_as_it_is_shown(tmp_path: Path, orientation: int, size: Size) -> None:
    """A phone stores a picture lying, and says in its EXIF data that it is to be turned."""
    path = picture(tmp_path / "a.jpg", 300, 200, orientation)
    prompts = (Prompt("without one"), Prompt("a cat", image=path))
    assert size_of_sources(find_preset("2k"), prompts) == size


def test_a_video_decides_too(tmp_path: Path) -> None:
    frames = torch.zeros(1, 96, 64, 3, dtype=torch.uint8)
    chunk = FrameChunk(start=0, pixel_format="rgb24", frames=frames)
    path = tmp_path / "v.mp4"
    write_video([chunk], path, width=64, height=96, frames=1, fps=24, codec="h264")
    prompts = (Prompt("a cat", draft_video=path),)
    assert size_of_sources(find_preset("2k"), prompts) == (1568, 2336)
    assert size_of_sources(find_preset("draft"), prompts) == (288, 384)


def test_pictures_of_two_sizes_are_listed(tmp_path: Path) -> None:
    wide, high = picture(tmp_path / "w.png", 300, 200), picture(tmp_path / "h.png", 200, 300)
    prompts = [Prompt("a", image=wide), Prompt("b", image=high), Prompt("c", image=high)]
    with pytest.raises(BadRequest) as refused:
        size_of_sources(find_preset("2k"), prompts)
    assert refused.value.got == f"{wide} 2336x1568, {high} 1568x2336"
    assert size_of_sources(find_preset("2k"), prompts[1:]) == (1568, 2336)


def test_without_a_picture_there_is_no_such_size(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no prompt has one"):
        size_of_sources(find_preset("2k"), [Prompt("a cat")])


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"x", "no picture of a known format")]
)
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadRequest) as refused:
        size_of_sources(find_preset("2k"), [Prompt("a cat", image=path)])
    assert said in str(refused.value)
    with pytest.raises(BadRequest, match="a video"):
        size_of_sources(find_preset("2k"), [Prompt("a cat", draft_video=path)])
