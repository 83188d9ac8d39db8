# SPDX-License-Identifier: Apache-2.0
"""Read the frames of video files that anyone may have made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

from pw_runtime.errors import BadRequest

_DO = "give a clip as `pw generate` writes it (.mp4, .mkv), complete and not renamed"


def video_frames(path: Path) -> Iterator[av.VideoFrame]:
    """Yield the frames of a video, one by one. Raises BadRequest where it is none or damaged."""
    with _opened(path) as container:
        yield from container.decode(video=0)


def count_frames(path: Path) -> int:
    """Count the frames of a video without decoding them. Raises BadRequest."""
    with _opened(path) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    if not path.is_file():
        raise BadRequest(
            f"{path} is not a video", got="no regular file" if path.exists() else "no file", do=_DO
        )
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise BadRequest(f"{path} is not a video", got="a file without pictures", do=_DO)
            yield container
    except (av.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadRequest(f"{path} cannot be read as a video", got=reason, do=_DO) from error
