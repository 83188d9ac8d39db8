# SPDX-License-Identifier: Apache-2.0
"""The video writer: what it writes reads back right, and a failure leaves nothing."""

from __future__ import annotations

import hashlib
import math
import os
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
import torch
from av.codec.codec import UnknownCodecError

from pw_kernels import pack_yuv
from pw_runtime.errors import BadRequest, WriteFailed
from pw_runtime.stages import write
from pw_runtime.stages.codecs import check_codec, check_limits, pixel_format_for, suffix
from pw_runtime.stages.write import VideoFile, write_video
from pw_runtime.types import Codec, Compat, FrameChunk, PixelFormat
from tests.oracle import vae as oracle

WIDTH, HEIGHT, FRAMES, FPS = 192, 128, 9, 24
CODECS: tuple[Codec, ...] = tuple(codec for codec in get_args(Codec) if codec != "png")


def clip(frames: int = FRAMES) -> torch.Tensor:
    """Draw smooth moving colour waves, [frames, HEIGHT, WIDTH, 3] uint8."""
    t = torch.arange(frames).view(-1, 1, 1, 1)
    y = torch.arange(HEIGHT).view(1, -1, 1, 1)
    x = torch.arange(WIDTH).view(1, 1, -1, 1)
    colour = torch.arange(3).view(1, 1, 1, 3)
    wave = torch.sin((x + 3 * t) / (20 + 4 * colour)) * torch.cos((y - 2 * t) / (16 + 3 * colour))
    return (128 + 100 * wave).round().to(torch.uint8)


def rgb_chunk(start: int, frames: torch.Tensor) -> FrameChunk:
    return FrameChunk(start=start, pixel_format="rgb24", frames=frames)


def planes(rgb: torch.Tensor) -> torch.Tensor:
    """Convert [F, height, width, 3] uint8 to planes, [F, height * 3/2, width]."""
    video = rgb.permute(3, 0, 1, 2).float() / 127.5 - 1
    return pack_yuv(oracle.pixel_patchify(video[None])[0], "yuv420p")


def chunked(rgb: torch.Tensor, sizes: tuple[int, ...] = (1, 4, 4)) -> Iterator[FrameChunk]:
    start = 0
    for part in rgb.split(list(sizes)):
        yield rgb_chunk(start, part)
        start += len(part)


def save(path: Path, codec: Codec, chunks: Iterable[FrameChunk]) -> VideoFile:
    return write_video(
        chunks, path, width=WIDTH, height=HEIGHT, frames=FRAMES, fps=FPS, codec=codec
    )


def never() -> Iterator[FrameChunk]:
    raise AssertionError("a chunk was asked for")
    yield


def decode(path: Path) -> torch.Tensor:
    with av.open(path) as container:
        pictures = [
            torch.from_numpy(
                frame.reformat(
                    format="rgb24",
                    src_colorspace=frame.colorspace,
                    dst_colorspace=frame.colorspace,
                    src_color_range=frame.color_range,
                    dst_color_range="JPEG",
                ).to_ndarray()
            )
            for frame in container.decode(video=0)
        ]
    return torch.stack(pictures)


@pytest.mark.parametrize("codec", CODECS)
def test_clip_reads_back_with_its_size_speed_and_tags(
    codec: Codec, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"a{suffix(codec)}"
    written = save(path, codec, chunked(clip()))
    assert written.bytes == path.stat().st_size
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert capfd.readouterr() == ("", ""), "an encoder writes to the user's terminal"

    with av.open(path) as container:
        (stream,) = container.streams.video
        context = stream.codec_context
        assert (context.width, context.height) == (WIDTH, HEIGHT)
        assert stream.average_rate == FPS
        assert container.duration == pytest.approx(1e6 * FRAMES / FPS, abs=2e3)
        tags = (context.color_range, context.colorspace, context.color_primaries, context.color_trc)
        times = [frame.time for frame in container.decode(stream)]
    # range, matrix, primaries, transfer; 1 is BT.709 (range: limited), 0 and 2 are full RGB
    assert tags == ((2, 0, 1, 1) if codec == "ffv1" else (1, 1, 1, 1))
    # Matroska keeps milliseconds.
    assert times == pytest.approx([i / FPS for i in range(FRAMES)], abs=1e-3)


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_lossy_codecs_stay_within_their_quantiser(codec: Codec, tmp_path: Path) -> None:
    """At these crf values the coarsest quantiser step is 5 levels. An error that is uniform
    over +- one step has an rms of 5 / sqrt(3) levels."""
    bound = 20 * math.log10(255 / (5 / math.sqrt(3)))  # 38.9 dB
    rgb = clip()
    save(tmp_path / "a.mp4", codec, chunked(rgb))
    error = (decode(tmp_path / "a.mp4").double() - rgb.double()).square().mean().item()
    assert 10 * math.log10(255**2 / error) >= bound


def test_ffv1_returns_every_rgb_byte(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=torch.uint8)
    save(tmp_path / "a.mkv", "ffv1", chunked(noise))
    assert torch.equal(decode(tmp_path / "a.mkv"), noise)


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_index_stands_before_the_pictures(codec: Codec, tmp_path: Path) -> None:
    save(tmp_path / "a.mp4", codec, chunked(clip()))
    data = (tmp_path / "a.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_hevc_carries_the_tag_that_apple_players_want(tmp_path: Path) -> None:
    save(tmp_path / "a.mp4", "hevc", chunked(clip()))
    with av.open(tmp_path / "a.mp4") as container:
        assert container.streams.video[0].codec_context.codec_tag == "hvc1"


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
@pytest.mark.parametrize(
    ("rgb", "yuv"),
    [
        # Y = 16 + 219 (.2126 R + .7152 G + .0722 B), and so on: BT.709, limited range.
        # BT.601 would give red Y 81, green Y 145, blue Y 41.
        ((255, 0, 0), (63, 102, 240)),
        ((0, 255, 0), (173, 42, 26)),
        ((0, 0, 255), (32, 240, 118)),
        ((128, 128, 128), (126, 128, 128)),
    ],
)
def test_colours_are_bt709(
    codec: Codec, rgb: tuple[int, int, int], yuv: tuple[int, int, int], tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    flat = torch.tensor(rgb, dtype=torch.uint8).expand(FRAMES, HEIGHT, WIDTH, 3)
    save(path, codec, chunked(flat))
    with av.open(path) as container:
        planes = torch.from_numpy(next(container.decode(video=0)).to_ndarray()).view(-1)
    luma = HEIGHT * WIDTH
    stored = planes[0], planes[luma], planes[luma + luma // 4]
    assert [int(value) for value in stored] == pytest.approx(yuv, abs=1)
    # One level of Y, U or V is at most 2.1 levels of R, G or B.
    assert decode(path)[0, HEIGHT // 2, WIDTH // 2].tolist() == pytest.approx(rgb, abs=5)


@pytest.mark.parametrize("codec", ["h264", "ffv1"])
def test_interruption_leaves_nothing_and_keeps_the_earlier_clip(
    codec: Codec, tmp_path: Path
) -> None:
    def interrupted() -> Iterator[FrameChunk]:
        yield rgb_chunk(0, clip()[:4])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "new", codec, interrupted())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "earlier").write_bytes(b"complete")
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "earlier", codec, interrupted())
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("earlier", b"complete")]


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        ([], "ended after 0 of 9"),
        ([(0, 8)], "ended after 8 of 9"),
        ([(0, 10)], "10 frames or more, expected 9"),
        ([(0, 9), (9, 1)], "10 frames or more, expected 9"),
        ([(0, 4), (5, 5)], "starts at frame 5, expected 4"),
        ([(0, 0), (0, 9)], "shape"),
    ],
)
def test_frames_other_than_announced_are_refused(
    chunks: list[tuple[int, int]], says: str, tmp_path: Path
) -> None:
    given = [rgb_chunk(start, clip(10)[:count]) for start, count in chunks]
    with pytest.raises(ValueError, match=says):
        save(tmp_path / "a", "h264", given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "rgb",
    [clip().float(), clip().permute(0, 3, 1, 2), clip()[:, :-2], clip()[0]],
    ids=["float", "channels first", "short", "one picture"],
)
def test_wrong_tensors_are_refused(rgb: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a chunk (has shape|is torch\.float32)"):
        save(tmp_path / "a", "h264", [rgb_chunk(0, rgb)])


@pytest.mark.parametrize("pixel_format", get_args(PixelFormat))
def test_three_chunks_are_alive_at_most(pixel_format: PixelFormat, tmp_path: Path) -> None:
    """One in the encoder and two more, including the one in production."""
    alive: list[int] = []
    memories: list[weakref.ref[np.ndarray]] = []
    source = clip(45) if pixel_format == "rgb24" else planes(clip(45))

    def watched() -> Iterator[FrameChunk]:
        for start in range(0, 45, 3):
            memory = source[start : start + 3].numpy().copy()
            memories.append(weakref.ref(memory))
            alive.append(sum(seen() is not None for seen in memories))
            yield FrameChunk(
                start=start, pixel_format=pixel_format, frames=torch.from_numpy(memory)
            )
            del memory

    write_video(
        watched(), tmp_path / "a", width=WIDTH, height=HEIGHT, frames=45, fps=FPS, codec="h264"
    )
    assert max(alive) <= 3
    assert [seen() for seen in memories] == [None] * 15


def planes_chunk(start: int, frames: int) -> FrameChunk:
    return FrameChunk(start=start, pixel_format="yuv420p", frames=planes(clip()[:frames]))


def test_planes_go_to_the_encoder_without_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frame uses their memory, and libswscale is not called."""
    monkeypatch.setattr(write, "VideoReformatter", lambda: None)
    chunk = planes_chunk(0, FRAMES)
    given = write._video_frame(None, chunk.frames[0].numpy(), "yuv420p", "yuv420p")  # type: ignore[arg-type]
    assert given.planes[0].buffer_ptr == chunk.frames.data_ptr()
    save(tmp_path / "a.mp4", "h264", [chunk])


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_planes_give_the_picture_that_libswscale_gives_of_bytes(
    codec: Codec, tmp_path: Path
) -> None:
    save(tmp_path / "rgb.mp4", codec, chunked(clip()))
    save(tmp_path / "yuv.mp4", codec, [planes_chunk(0, FRAMES)])
    pictures = decode(tmp_path / "rgb.mp4"), decode(tmp_path / "yuv.mp4")
    error = (pictures[0].double() - pictures[1].double()).square().mean().item()
    assert 10 * math.log10(255**2 / error) > 45
    with av.open(tmp_path / "yuv.mp4") as container:
        context = container.streams.video[0].codec_context
        tags = (context.color_range, context.colorspace, context.color_primaries, context.color_trc)
    assert tags == (1, 1, 1, 1)


def test_planes_instead_of_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a chunk is yuv420p, expected rgb24 or bgr0"):
        save(tmp_path / "a.mkv", "ffv1", [planes_chunk(0, FRAMES)])


@pytest.mark.parametrize("truncating", [False, True])
def test_frames_are_decoded_to_what_the_encoder_takes(truncating: bool) -> None:
    compat = Compat(truncating_uint8=truncating)
    expected = "rgb24" if truncating else "yuv420p"
    for codec in CODECS:
        assert pixel_format_for(codec, compat) == ("rgb24" if codec == "ffv1" else expected)


def test_missing_encoder_is_reported_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str, mode: str) -> None:
        raise UnknownCodecError(name)

    for codec in CODECS:
        check_codec(codec, frames=FRAMES)
    monkeypatch.setattr(av, "Codec", unknown)
    with pytest.raises(BadRequest, match="libx265"):
        check_codec("hevc", frames=FRAMES)
    with pytest.raises(BadRequest, match="libx265"):
        save(tmp_path / "a", "hevc", never())


@pytest.mark.parametrize(
    ("codec", "limit", "words"),
    [
        ("av1", {"width": 64, "height": 64, "fps": 240}, "takes no video of this rate"),
        ("av1", {"width": 64, "height": 8704, "fps": 24}, "takes no frames of this size"),
        ("h264", {"width": 16384, "height": 32, "fps": 24}, "takes no frames of this size"),
    ],
)
def test_what_an_encoder_refuses_is_refused_before_anything_is_computed(
    codec: Codec, limit: dict[str, int], words: str
) -> None:
    check_limits(codec, **limit)
    name = "fps" if "rate" in words else max(("width", "height"), key=lambda side: limit[side])
    with pytest.raises(BadRequest, match=words):
        check_limits(codec, **(limit | {name: limit[name] + 1}))


def test_a_file_that_lost_frames_is_not_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = write._encode

    def lossy(chunks: Iterator[FrameChunk], path: Path, *rest: object) -> None:
        encode(chunks, path, *rest)  # type: ignore[arg-type]
        os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(write, "_encode", lossy)
    with pytest.raises(WriteFailed, match=r"incomplete\n.*got: \d frames.*\n.*wanted: 9 frames"):
        save(tmp_path / "a.mkv", "ffv1", chunked(clip()))
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_fails_before_a_frame_is_requested(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed, match="No such file or directory"):
        save(tmp_path / "none" / "a.mp4", "h264", never())


def test_picture_the_encoder_refuses_is_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed, match=r"cannot write .*a\.mp4"):
        write_video([], tmp_path / "a.mp4", width=191, height=128, frames=1, fps=FPS, codec="h264")
    assert list(tmp_path.iterdir()) == []


def test_environment_is_as_before(tmp_path: Path) -> None:
    before = dict(os.environ)
    save(tmp_path / "a.mp4", "av1", chunked(clip()))
    assert dict(os.environ) == before
