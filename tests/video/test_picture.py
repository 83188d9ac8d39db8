# SPDX-License-Identifier: Apache-2.0
"""A clip of one frame as a PNG: its pixels are those of the lossless video, and it is checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from pw_runtime.errors import BadRequest, WriteFailed
from pw_runtime.job.video_tags import video_tags
from pw_runtime.stages import write
from pw_runtime.stages.write import write_video
from pw_runtime.system.video_input import VideoFacts, decoded_facts, video_frames
from pw_runtime.types import Codec, FrameChunk
from tests.video.test_tags import TEXTS, provenance

WIDTH, HEIGHT = 96, 64


def noise() -> torch.Tensor:
    drawn = torch.Generator().manual_seed(0)
    shape = (1, HEIGHT, WIDTH, 3)
    return torch.randint(0, 256, shape, generator=drawn, dtype=torch.uint8)


def save(path: Path, codec: Codec, pixels: torch.Tensor, **changes: object) -> Path:
    chunk = FrameChunk(start=0, pixel_format="rgb24", frames=pixels)
    sizes = {"width": WIDTH, "height": HEIGHT, "frames": 1, "fps": 24}
    write_video([chunk], path, codec=codec, **(sizes | changes))  # type: ignore[arg-type]
    return path


def test_a_png_has_the_pixels_of_the_lossless_video_bit_for_bit(tmp_path: Path) -> None:
    frames = noise()
    png, video = save(tmp_path / "a.png", "png", frames), save(tmp_path / "a.mkv", "ffv1", frames)
    (as_video,) = [frame.to_ndarray(format="rgb24") for frame in video_frames(video)]
    with Image.open(png) as image:
        assert image.mode == "RGB"
        assert image.info["srgb"] == 0
        picture = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(HEIGHT, WIDTH, 3)
    assert torch.equal(picture, frames[0])
    assert torch.equal(picture, torch.from_numpy(as_video))


@pytest.mark.parametrize("text", TEXTS)
def test_any_prompt_reads_back_from_the_picture(tmp_path: Path, text: str) -> None:
    tags = video_tags(provenance(text))
    with Image.open(save(tmp_path / "a.png", "png", noise(), tags=tags)) as image:
        image.load()
        assert {name: image.info[name.capitalize()] for name in tags} == tags


def test_equal_frames_give_equal_pictures(tmp_path: Path) -> None:
    first, second = (save(tmp_path / f"{n}.png", "png", noise()).read_bytes() for n in "ab")
    assert first == second


def test_more_frames_than_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="png holds one frame"):
        save(tmp_path / "a.png", "png", noise().expand(5, -1, -1, -1), frames=5)
    with pytest.raises(ValueError, match="ended after 0 of 1"):
        write_video([], tmp_path / "a.png", width=32, height=32, frames=1, fps=24, codec="png")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_png", refused)
    with pytest.raises(WriteFailed, match="No space left"):
        save(tmp_path / "a.png", "png", noise())
    assert not list(tmp_path.iterdir())


def test_a_damaged_picture_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", "png", noise())
    assert decoded_facts(path) == VideoFacts(
        width=WIDTH, height=HEIGHT, frames=1, fps=None, codec="png"
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadRequest, match="cannot be read"):
        decoded_facts(path)
