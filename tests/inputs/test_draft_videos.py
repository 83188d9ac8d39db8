# SPDX-License-Identifier: Apache-2.0
"""Videos of every kind as the frames of a clip: times, sizes, directions, colours, refusals."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pw_runtime.errors import BadRequest
from pw_runtime.system.video_source import SourceVideo, examine_video, video_chunks
from pw_runtime.types import VideoConfig
from tests.inputs.videos import (
    CORNERS,
    H264,
    HEIGHT,
    LOSSLESS,
    WIDTH,
    Kind,
    corners,
    shades,
    write_planes,
    write_video,
)

CLIP = VideoConfig(frames=5, fps=12)


def examined(path: Path, clip: VideoConfig = CLIP) -> SourceVideo:
    return examine_video(path, clip, WIDTH, HEIGHT)


def frames_of(
    path: Path, clip: VideoConfig = CLIP, width: int = WIDTH, height: int = HEIGHT
) -> np.ndarray:
    """All frames of a clip, [F, height, width, 3] from 0 to 255."""
    source = examine_video(path, clip, width, height)
    frames = torch.cat(list(video_chunks(source, width, height)), dim=1)
    assert frames.shape == (3, clip.frames, height, width)
    assert frames.dtype == torch.float32
    return ((frames + 1) * 127.5).permute(1, 2, 3, 0).numpy()


def shown(path: Path, clip: VideoConfig = CLIP) -> list[int]:
    """The shades of `shades` that the frames of a clip have, from 1."""
    return [round(float(frame.mean()) / 10) for frame in frames_of(path, clip)]


def corners_of(frame: np.ndarray) -> list[tuple[int, ...]]:
    height, width = frame.shape[:2]
    rows, columns = (height // 4, 3 * height // 4), (width // 4, 3 * width // 4)
    return [tuple(frame[y, x].round().astype(int)) for y in rows for x in columns]


def assert_colours(found: list[tuple[int, ...]], wanted: list[int], within: float = 2) -> None:
    """Compare corners with those of `corners`, by index."""
    for colour, index in zip(found, wanted, strict=True):
        assert np.abs(np.subtract(colour, CORNERS[index])).max() <= within, (found, wanted)


def test_lossless_frames_of_the_same_size_and_rate_are_taken_exactly(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8) for _ in range(5)]
    path = write_video(tmp_path / "a.mkv", pictures, kind=LOSSLESS)
    found = frames_of(path)
    assert np.abs(found - np.stack(pictures)).max() < 1e-4
    assert examined(path).notices == ()


@pytest.mark.parametrize(
    ("rate", "picks"), [(12, [1, 2, 3, 4, 5]), (24, [1, 3, 5, 7, 9]), (6, [1, 1, 2, 2, 3])]
)
def test_frames_are_those_nearest_in_time(tmp_path: Path, rate: int, picks: list[int]) -> None:
    path = write_video(tmp_path / "a.mp4", shades(12), rate)
    assert shown(path) == picks


def test_a_variable_rate_goes_by_presentation_times(tmp_path: Path) -> None:
    """Frames at 0, 20, 200, 230 and 500 ms, for a clip at 0, 83, 167, 250 and 333 ms."""
    path = write_video(tmp_path / "a.mkv", shades(5), 12, times=[0, 20, 200, 230, 500])
    assert shown(path) == [1, 2, 3, 4, 4]


def test_the_first_frame_is_the_beginning_whatever_its_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", shades(6), 12, times=[700 + 83 * i for i in range(6)])
    assert shown(path) == [1, 2, 3, 4, 5]


def test_frames_without_usable_times_are_counted_and_it_is_said(tmp_path: Path) -> None:
    """AVI has no presentation times, and H.264 reorders frames."""
    path = write_video(tmp_path / "a.avi", shades(12), 24)
    assert shown(path) == [1, 3, 5, 7, 9]
    assert "its frames have no usable times: 24 fps assumed" in examined(path).notices


def test_what_a_longer_video_has_left_is_said(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", shades(12))
    assert "the first 0.42 s of 1.00 s are used" in examined(path).notices
    assert examined(path).longer
    assert not examined(write_video(tmp_path / "b.mp4", shades(5))).longer


def test_a_shorter_video_is_refused_with_frames_and_rates_that_fit(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", shades(11))
    clip = VideoConfig(frames=17, fps=12)
    with pytest.raises(BadRequest, match=r"shorter than the clip") as error:
        examined(path, clip)
    assert "--frames 9" in str(error.value)
    assert "video.fps=18" in str(error.value)
    assert len(examined(path, VideoConfig(frames=9, fps=12)).picks) == 9
    assert len(examined(path, VideoConfig(frames=17, fps=18)).picks) == 17
    with pytest.raises(BadRequest):
        examined(path, VideoConfig(frames=13, fps=12))
    with pytest.raises(BadRequest):
        examined(path, VideoConfig(frames=17, fps=17))


def test_a_single_picture_is_refused_unless_the_clip_is_one(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", shades(1))
    with pytest.raises(BadRequest, match="single picture") as error:
        examined(path)
    assert "--image" in str(error.value)
    assert shown(path, VideoConfig(frames=1, fps=12)) == [1]


@pytest.mark.parametrize(
    ("turn", "mirrored", "wanted"),
    [
        (0, False, [0, 1, 2, 3]),
        (-90, False, [2, 0, 3, 1]),
        (90, False, [1, 3, 0, 2]),
        (180, False, [3, 2, 1, 0]),
        (0, True, [1, 0, 3, 2]),
    ],
)
def test_a_video_is_turned_and_mirrored_as_it_says(
    tmp_path: Path, turn: int, mirrored: bool, wanted: list[int]
) -> None:
    path = write_video(tmp_path / "a.mp4", [corners(48, 48)] * 5, turn=turn, mirrored=mirrored)
    assert_colours(corners_of(frames_of(path, CLIP, 48, 48)[0]), wanted)
    assert ("it is turned upright, as it says" in examined(path).notices) == bool(turn or mirrored)


def test_a_turn_by_no_quarter_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", [corners()] * 5, turn=30)
    with pytest.raises(BadRequest, match="turned by no quarter"):
        examined(path)


def test_a_portrait_video_covers_the_frame_from_its_centre(tmp_path: Path) -> None:
    picture = np.zeros((96, 48, 3), np.uint8)
    picture[36:60] = 200  # rows that a 2:1 frame shows
    path = write_video(tmp_path / "a.mkv", [picture] * 5, kind=LOSSLESS)
    assert np.allclose(frames_of(path, CLIP, 96, 48)[0][4:-4], 200, atol=2)
    notices = examine_video(path, CLIP, 96, 48).notices
    assert "75% of its picture is cut off, to fit 96x48" in notices


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    """Of 64x48 samples, 2:1 each, a frame of 64x48 shows the inner half of the columns."""
    path = write_video(tmp_path / "a.mp4", [corners()] * 5, aspect=Fraction(2))
    picture = corners()
    picture[:, :16], picture[:, 48:] = 0, 0
    cropped = write_video(tmp_path / "b.mp4", [picture] * 5, aspect=Fraction(2))
    inner = (slice(8, -8), slice(8, -8))
    assert np.abs(frames_of(path)[0][inner] - frames_of(cropped)[0][inner]).max() < 6
    assert "its pixels are 2:1, and made square" in examined(path).notices


@pytest.mark.parametrize(
    "kind",
    [
        Kind(matrix=1),
        Kind(matrix=5),
        Kind(matrix=6),
        Kind(matrix=7),
        Kind(matrix=9),
        Kind(matrix=1, full=True),
        Kind(matrix=5, full=True),
        Kind(matrix=5, pixels="yuv444p"),
        Kind(matrix=1, pixels="yuv422p"),
        Kind(matrix=1, pixels="yuv420p10le"),
        Kind(matrix=9, pixels="yuv420p10le", full=True),
        Kind(matrix=9, pixels="yuv422p10le", codec="prores_ks", options=()),
        Kind(matrix=1, pixels="yuv444p12le", codec="ffv1", options=()),
        Kind(matrix=1, pixels="nv12"),
        Kind(pixels="gbrp10le", codec="ffv1", options=(), matrix=0),
        Kind(pixels="rgb48le", codec="ffv1", options=(), matrix=0),
        Kind(pixels="yuvj420p", codec="mjpeg", options=(("qscale", "1"),), matrix=5, full=True),
    ],
    ids=str,
)
def test_colours_are_read_as_they_were_coded(tmp_path: Path, kind: Kind) -> None:
    path = write_video(tmp_path / "a.mov" if "prores" in kind.codec else tmp_path / "a.mkv",
                       [corners()] * 5, kind=kind)  # fmt: skip
    within = 6 if kind.codec in ("mjpeg", "prores_ks") else 3
    assert_colours(corners_of(frames_of(path)[0]), [0, 1, 2, 3], within)
    assert not any("assumed" in notice for notice in examined(path).notices)


def test_ten_bits_are_not_rounded_to_eight(tmp_path: Path) -> None:
    """A ramp of 64 neighbouring levels of 10 bits keeps that many, and their distance."""
    ramp = np.repeat((np.arange(WIDTH) + 400)[None], HEIGHT, 0).astype(np.uint16)
    kind = Kind(codec="ffv1", pixels="gray10le", options=())
    path = write_planes(tmp_path / "a.mkv", ramp, kind)
    row = frames_of(path)[0][0, :, 0]
    assert np.allclose(np.diff(row), 255 / (219 * 4), atol=1e-3)


def test_greys_of_no_named_range_are_full_and_it_is_said(tmp_path: Path) -> None:
    levels = np.tile(np.array([0, 16, 235, 255], np.uint8), (HEIGHT, WIDTH // 4))
    kind = Kind(codec="ffv1", pixels="gray", options=())
    path = write_planes(tmp_path / "a.mkv", levels, kind, named_range=0)
    row = frames_of(path)[0][0, :4, 0]
    assert np.allclose(row, levels[0, :4], atol=0.01)
    assert any("range of its greys" in notice for notice in examined(path).notices)


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "nv12", "yuv411p", "yuv420p10le"])
def test_odd_sizes_have_a_last_half_of_chroma(tmp_path: Path, pixels: str) -> None:
    """The last column of chroma, and its last row, belong to one of luma."""
    lossless = Kind(codec="ffv1", pixels=pixels, options=())
    kind, size = (lossless, (85, 47)) if pixels != "nv12" else (Kind(pixels=pixels), (86, 46))
    path = write_video(tmp_path / "a.mkv", [corners(*size)] * 5, kind=kind)
    assert_colours(corners_of(frames_of(path)[0]), [0, 1, 2, 3], 3)


@pytest.mark.parametrize(
    ("size", "name"), [((64, 48), "BT.601"), ((1280, 64), "BT.709"), ((64, 720), "BT.709")]
)
def test_a_matrix_that_is_not_named_is_that_of_the_size_and_said(
    tmp_path: Path, size: tuple[int, int], name: str
) -> None:
    matrix = 5 if name == "BT.601" else 1
    named = write_video(tmp_path / "a.mkv", [corners(*size)] * 5, kind=Kind(matrix=matrix))
    path = tmp_path / "b.mkv"
    path.write_bytes(named.read_bytes())
    unnamed = write_video(path, [corners(*size)] * 5, kind=Kind(matrix=2))
    text = f"it does not say how its colours are coded: {name} is assumed, as for its size"
    assert text in examine_video(unnamed, CLIP, *size).notices


def test_chroma_is_where_luma_is(tmp_path: Path) -> None:
    """Column 30 of chroma is where column 60 of luma is, and row 20 between rows 40 and 41."""
    kind = Kind(codec="ffv1", pixels="yuv420p", options=())
    planes = np.full((96 * 3 // 2, 128), 128, np.uint8)
    v = planes[120:].reshape(48, 64)
    v[20, 30] = 188
    path = write_planes(tmp_path / "a.mkv", planes, kind)
    red = frames_of(path, CLIP, 128, 96)[0][..., 0] - 255 * 112 / 219
    rows, columns = np.arange(96)[:, None], np.arange(128)
    assert (red * columns).sum() / red.sum() == pytest.approx(60, abs=0.01)
    assert (red * rows).sum() / red.sum() == pytest.approx(40.5, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Kind(transfer=16, primaries=9, matrix=9, pixels="yuv420p10le"), "HDR"),
        (Kind(transfer=18, primaries=9, matrix=9, pixels="yuv420p10le"), "HDR"),
        (Kind(transfer=8), "linear"),
        (Kind(matrix=10), "codes its colours"),
        (Kind(matrix=14), "codes its colours"),
    ],
    ids=str,
)
def test_what_would_look_wrong_is_refused_with_what_to_do(
    tmp_path: Path, kind: Kind, text: str
) -> None:
    path = tmp_path / "a.mkv"
    coded = replace(kind, matrix=1, codec="ffv1", options=())
    content = write_video(path, [corners()] * 5, kind=coded).read_bytes()
    mark = b"\x55\xb1\x81"  # MatrixCoefficients of Matroska
    assert content.count(mark + b"\x01") == 1
    path.write_bytes(content.replace(mark + b"\x01", mark + bytes([kind.matrix])))
    with pytest.raises(BadRequest, match=text) as error:
        examined(path)
    assert "ffmpeg" in str(error.value)


def test_interlaced_video_is_refused(tmp_path: Path) -> None:
    kind = Kind(codec="mpeg2video", options=(("flags", "+ildct+ilme"), ("top", "1")))
    path = write_video(tmp_path / "a.mkv", [corners()] * 5, 25, kind)
    with pytest.raises(BadRequest, match="interlaced"):
        examined(path, VideoConfig(frames=5, fps=25))


def test_transparency_and_wide_gamut_are_said(tmp_path: Path) -> None:
    kind = Kind(codec="ffv1", pixels="bgra", options=(), matrix=0)
    assert (
        "its transparency is ignored"
        in examined(write_video(tmp_path / "a.mkv", [corners()] * 5, kind=kind)).notices
    )
    wide = write_video(tmp_path / "b.mkv", [corners()] * 5, kind=Kind(primaries=9))
    assert any("BT.2020" in notice for notice in examined(wide).notices)


def test_no_video_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.mp4"
    text.write_text("no video")
    sound = tmp_path / "b.mp4"
    whole = write_video(tmp_path / "c.mp4", shades(24), 12)
    cut = tmp_path / "d.mp4"
    cut.write_bytes(whole.read_bytes()[:-200])
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for path in (text, sound, cut, tmp_path, tmp_path / "missing.mp4"):
        with pytest.raises(BadRequest) as error:
            examined(path)
        assert str(path) in str(error.value)


def test_only_the_frames_of_a_chunk_are_in_memory(tmp_path: Path) -> None:
    """Frames are decoded when the encoder asks for them."""
    path = write_video(tmp_path / "a.mp4", shades(6) * 10, kind=H264)
    chunks = video_chunks(examined(path, VideoConfig(frames=57, fps=12)), WIDTH, HEIGHT)
    sizes = [tuple(chunk.shape) for chunk in chunks]
    assert sizes == [(3, 1, HEIGHT, WIDTH)] + [(3, 4, HEIGHT, WIDTH)] * 14


def test_a_file_that_changed_in_between_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", shades(12))
    source = examined(path, VideoConfig(frames=9, fps=12))
    write_video(path, shades(3))
    with pytest.raises(BadRequest, match="has changed"):
        list(video_chunks(source, WIDTH, HEIGHT))
