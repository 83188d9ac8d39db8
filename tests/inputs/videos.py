# SPDX-License-Identifier: Apache-2.0
"""Small videos of every kind, made with PyAV: what people may give as a draft."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT = 64, 48
BT709, MPEG = 1, 1  # matrix, primaries and transfer function; limited range
CORNERS = ((235, 20, 30), (20, 220, 40), (30, 30, 225), (128, 128, 128))
"""Red, green, blue and grey: top left, top right, bottom left, bottom right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A way to code a video."""

    codec: str = "libx264"
    pixels: str = "yuv420p"
    matrix: int = BT709
    full: bool = False
    transfer: int = BT709
    primaries: int = BT709
    options: tuple[tuple[str, str], ...] = (("crf", "1"),)


H264 = Kind()
LOSSLESS = Kind(codec="ffv1", pixels="bgr0", options=())


def corners(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Four areas of one colour each, [height, width, 3] uint8."""
    picture = np.empty((height, width, 3), np.uint8)
    rows, columns = height // 2, width // 2
    picture[:rows, :columns], picture[:rows, columns:] = CORNERS[0], CORNERS[1]
    picture[rows:, :columns], picture[rows:, columns:] = CORNERS[2], CORNERS[3]
    return picture


def shades(count: int, width: int = WIDTH, height: int = HEIGHT) -> list[np.ndarray]:
    """Grey pictures, of which the first is 10, the second 20 and so on."""
    return [np.full((height, width, 3), 10 * (i + 1), np.uint8) for i in range(count)]


def write_video(
    path: Path,
    pictures: Iterable[np.ndarray],
    rate: int = 12,
    kind: Kind = H264,
    *,
    times: Sequence[int] | None = None,
    turn: float | None = None,
    mirrored: bool = False,
    aspect: Fraction | None = None,
    sound: float | None = None,
    sound_codec: str = "aac",
) -> Path:
    """Write pictures as a video; `times` are those of the frames in units of 1/1000 s.

    `sound` is the length in seconds of a tone.
    """
    pictures = list(pictures)
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(kind.codec, rate=rate, options=dict(kind.options))
        stream.width, stream.height, stream.pix_fmt = width, height, kind.pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.sample_aspect_ratio = aspect
        if turn is not None or mirrored:
            stream.set_display_rotation(turn or 0.0, hflip=mirrored)
        context = stream.codec_context
        context.colorspace, context.color_range = kind.matrix, 2 if kind.full else MPEG
        context.color_trc, context.color_primaries = kind.transfer, kind.primaries
        tone: Any = None if sound is None else container.add_stream(sound_codec, rate=48000)
        if sound is not None:
            _add_tone(container, tone, sound)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(
                format=kind.pixels,
                src_colorspace=5 if kind.matrix == 2 else kind.matrix,
                dst_colorspace=5 if kind.matrix == 2 else kind.matrix,
                src_color_range=2,
                dst_color_range=2 if kind.full else MPEG,
                interpolation=av.video.reformatter.Interpolation.BICUBIC
                | av.video.reformatter.Interpolation.ACCURATE_RND,
            )
            frame.pts = index if times is None else times[index]
            if times is not None:
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_planes(path: Path, planes: np.ndarray, kind: Kind, named_range: int = MPEG) -> Path:
    """Write five frames of the same samples, as PyAV lays them out."""
    rows, width = planes.shape
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(kind.codec, rate=12)
        height = rows if kind.pixels.startswith("gray") else rows * 2 // 3
        stream.width, stream.height, stream.pix_fmt = width, height, kind.pixels
        context = stream.codec_context
        context.colorspace, context.color_range = kind.matrix, named_range
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(planes, kind.pixels)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _add_tone(container: Any, stream: Any, seconds: float) -> None:
    """Encode a tone of 440 Hz."""
    stream.layout = "mono"
    count = int(seconds * 48000)
    wave = 0.2 * np.sin(2 * np.pi * 440 * np.arange(count) / 48000)
    frame = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 48000, 0
    for resampled in av.AudioResampler(
        stream.format, "mono", 48000, frame_size=stream.codec_context.frame_size or 1024
    ).resample(frame):
        container.mux(stream.encode(resampled))
    container.mux(stream.encode())
