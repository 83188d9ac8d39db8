# SPDX-License-Identifier: Apache-2.0
"""Read the frames of video files that anyone may have made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av

from pw_runtime.errors import BadRequest

_DO = "give a clip as `pw generate` writes it (.mp4, .mkv, .png), complete and not renamed"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFacts:
    """Content of a video file, all of whose frames were decoded."""

    width: int  # pixels
    height: int
    frames: int
    fps: float | None  # None: a picture
    codec: str | None = None  # as libavcodec names it; None: any

    def __str__(self) -> str:
        """Return the facts in a line."""
        frames = "1 frame" if self.frames == 1 else f"{self.frames} frames"
        speed = "" if self.fps is None else f" at {self.fps:g} fps"
        codec = "" if self.codec is None else f", {self.codec}"
        return f"{frames} of {self.width}x{self.height}{speed}{codec}"


def video_frames(path: Path) -> Iterator[av.VideoFrame]:
    """Yield the frames of a video, one by one. Raises BadRequest where it is none or damaged."""
    with opened(path) as container:
        yield from container.decode(video=0)


def count_frames(path: Path) -> int:
    """Count the frames of a video without decoding them. Raises BadRequest."""
    with opened(path) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)


def decoded_facts(path: Path) -> VideoFacts:
    """Decode all frames of a video, hiding no fault that a player would; return what it is.

    Raises BadRequest where it is none, or damaged in a way that the decoder notices.
    """
    with opened(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
        frames = sum(1 for _ in container.decode(video=0))
        context = stream.codec_context
        picture = context.codec.name == "png"  # for which libav makes up a speed
        return VideoFacts(
            width=context.width,
            height=context.height,
            frames=frames,
            fps=None if picture else float(stream.average_rate or 0),
            codec=context.codec.name,
        )


@contextmanager
def opened(path: Path, do: str = _DO) -> Iterator[av.container.InputContainer]:
    """Open a video inside the block. Raises BadRequest, with `do`, where it is none or damaged."""
    if not os.path.isfile(path):
        there = os.path.exists(path)
        raise BadRequest(
            f"{path} is not a video", got="no regular file" if there else "no file", do=do
        )
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise BadRequest(f"{path} is not a video", got="a file without pictures", do=do)
            if container.streams.video[0].codec_context is None:
                raise BadRequest(f"{path} is not a video", got="pictures of no known codec", do=do)
            yield container
    except (av.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadRequest(f"{path} cannot be read as a video", got=reason, do=do) from error
