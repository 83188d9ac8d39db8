# SPDX-License-Identifier: Apache-2.0
"""A video that can be watched while it is made, and the same final file with it as without."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
import torch
from av.container import OutputContainer

from pw_runtime.errors import BadRequest, WriteFailed
from pw_runtime.stages import write
from pw_runtime.stages.fragmented_mp4 import partial_path
from pw_runtime.stages.write import write_video
from pw_runtime.types import Codec, FrameChunk

WIDTH, HEIGHT, FRAMES = 96, 64, 121


def chunks(stop: int = FRAMES) -> Iterator[FrameChunk]:
    t = torch.arange(FRAMES).view(-1, 1, 1, 1)
    x = torch.arange(WIDTH).view(1, 1, -1, 1)
    rgb = (128 + 100 * torch.sin((x + 3 * t) / 9)).to(torch.uint8)
    rgb = rgb.expand(FRAMES, HEIGHT, WIDTH, 3).contiguous()
    for start in range(0, stop, 4):
        yield FrameChunk(start=start, pixel_format="rgb24", frames=rgb[start : start + 4])


def save(
    path: Path, source: Iterator[FrameChunk], codec: Codec = "h264", *, growing: bool = True
) -> None:
    write_video(
        source, path, width=WIDTH, height=HEIGHT, frames=FRAMES, fps=24, codec=codec,
        partial_video=partial_path(path) if growing else None,
    )  # fmt: skip


def pictures(path: Path) -> dict[int, torch.Tensor]:
    """By index: where a file is cut off, frames may miss that are shown before its last ones."""
    with av.open(path) as container:
        return {
            round(frame.time * 24): torch.from_numpy(frame.to_ndarray())
            for frame in container.decode(video=0)
        }


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_a_copy_from_the_middle_plays_and_shows_the_frames_of_the_end(
    codec: Codec, tmp_path: Path
) -> None:
    """When the last chunk is asked for, all but the last three are with the encoder, which keeps
    less than half of the clip back."""
    path, copy = tmp_path / "a.mp4", tmp_path / "copy.mp4"

    def copied() -> Iterator[FrameChunk]:
        for chunk in chunks():
            if chunk.start == FRAMES - 1:
                shutil.copy(partial_path(path), copy)
            yield chunk

    save(path, copied(), codec)
    early, final = pictures(copy), pictures(path)
    assert len(final) == FRAMES
    assert 12 <= len(early) < FRAMES
    assert all(torch.equal(picture, final[i]) for i, picture in early.items())


@pytest.mark.parametrize("codec", ["h264", "hevc"])
def test_the_final_file_is_the_same_byte_for_byte_and_alone(codec: Codec, tmp_path: Path) -> None:
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    save(tmp_path / "with" / "a.mp4", chunks(), codec)
    save(tmp_path / "without" / "a.mp4", chunks(), codec, growing=False)
    assert [p.name for p in (tmp_path / "with").iterdir()] == ["a.mp4"]
    made = [(tmp_path / name / "a.mp4").read_bytes() for name in ("with", "without")]
    assert made[0] == made[1]


def test_what_grew_stays_when_the_decode_fails(tmp_path: Path) -> None:
    def interrupted() -> Iterator[FrameChunk]:
        yield from chunks(100)
        raise KeyboardInterrupt

    (tmp_path / "a.partial.mp4").write_bytes(b"of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.mp4", interrupted())
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial.mp4"]
    with av.open(tmp_path / "a.partial.mp4") as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([i / 24 for i in range(len(times))], abs=1e-4)
    assert len(times) > 50


def test_hevc_grows_with_the_tag_that_apple_players_want(tmp_path: Path) -> None:
    def interrupted() -> Iterator[FrameChunk]:
        yield from chunks(100)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.mp4", interrupted(), "hevc")
    assert b"hvc1" in (tmp_path / "a.partial.mp4").read_bytes()


def test_ffv1_cannot_grow(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="which ffv1 does not"):
        save(tmp_path / "a.mkv", chunks(), "ffv1")


def test_an_encoder_that_breaks_stops_the_decode_and_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is raised in the encoder's thread, and met in this one before three more chunks
    are made."""
    seen, asked = [], []

    def broken(packets: object, container: OutputContainer, copy: object) -> None:
        seen.append(threading.current_thread())
        raise av.error.ExternalError(-542398533, "Generic error in an external library")

    def counted() -> Iterator[FrameChunk]:
        for chunk in chunks():
            asked.append(chunk.start)
            yield chunk

    monkeypatch.setattr(write, "_mux", broken)
    with pytest.raises(WriteFailed, match="Generic error"):
        save(tmp_path / "a.mp4", counted(), growing=False)
    assert seen[0] is not threading.current_thread()
    assert seen[0] not in threading.enumerate()
    assert len(asked) <= 3
    assert list(tmp_path.iterdir()) == []
