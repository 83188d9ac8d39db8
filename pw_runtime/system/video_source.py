# SPDX-License-Identifier: Apache-2.0
"""Read a video of any kind as the frames of a clip: its times, its size, its colours.

Frames are decoded one by one, and only those are converted that the clip needs. A frame of the clip
is the frame of the video that is nearest in presentation time, counted from the video's first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import torch
from torch import Tensor

from pw_runtime.errors import BadRequest
from pw_runtime.system.frame_pixels import Turn, fitted, kept_share, read_look, read_turn
from pw_runtime.system.video_input import opened
from pw_runtime.types import VAE_STRIDE, VideoConfig

_DO = "give a complete video file, such as .mp4, .mov, .mkv or .webm"
_UNNOTICED = 0.005  # share of a picture that may be cut off without a word


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceVideo:
    """A video that was decoded once, as far as a clip needs it.

    Attributes:
        path: of the file.
        picks: for each frame of the clip, the index of the frame that it shows.
        seconds: that the clip takes of it.
        longer: the video goes on after that.
        notices: for the user: what was assumed, changed or left out.
    """

    path: Path
    picks: tuple[int, ...]
    seconds: Fraction
    longer: bool
    notices: tuple[str, ...]


@dataclass(slots=True)
class _Times:
    """Presentation times of the frames decoded so far, in seconds from the first one.

    Where a file has none, or some go back, the frames are counted at the average rate.
    """

    rate: Fraction | None  # frames per second, on average
    seconds: list[Fraction]
    counted: bool = False
    length: Fraction = Fraction(0)  # of the last frame
    _origin: Fraction | None = None

    def add(self, frame: av.VideoFrame) -> None:
        """Take the next frame. Raises BadRequest where it has no time and no rate is known."""
        step = None if self.rate is None else 1 / self.rate
        if frame.pts is None or frame.time_base is None:
            time = None
        else:
            time = frame.pts * frame.time_base
            self._origin = time if self._origin is None else self._origin
            time -= self._origin
            step = frame.duration * frame.time_base if frame.duration else step
        if not self.counted and (time is None or (self.seconds and time <= self.seconds[-1])):
            self.counted = True
            self.seconds = [self._at(i) for i in range(len(self.seconds))]
        if self.counted or time is None:
            time = self._at(len(self.seconds))
            step = self._at(1)
        if step is None:  # of an only frame: any length is as good
            step = time - self.seconds[-1] if self.seconds else Fraction(1, 25)
        self.seconds.append(time)
        self.length = step

    def _at(self, index: int) -> Fraction:
        if self.rate is None:
            raise BadRequest(
                "the frames of the video have no presentation times, and no rate", do=_DO
            )
        return index / self.rate

    @property
    def end(self) -> Fraction:
        """Time at which the last frame ends."""
        return self.seconds[-1] + self.length if self.seconds else Fraction(0)


def examine_video(path: Path, video: VideoConfig, width: int, height: int) -> SourceVideo:
    """Decode a video once, as far as a clip needs it, and say what will be made of it.

    Args:
        path: of the file.
        video: frames and rate of the clip.
        width: of the clip's frames, in pixels.
        height: of the clip's frames, in pixels.

    Raises BadRequest where it is no video, damaged, shorter than the clip, HDR or interlaced.
    """
    length = Fraction(video.frames, video.fps)
    said: dict[str, None] = {}  # in order, each once
    turn: Turn | None = None
    with opened(path, _DO) as container:
        stream = container.streams.video[0]
        times = _Times(rate=stream.average_rate, seconds=[])
        for frame in _decoded(container, path):
            turn = turn or read_turn(frame, path)
            look = read_look(frame, stream.sample_aspect_ratio, turn, path)
            lost = 1 - kept_share(look, width, height)
            said |= dict.fromkeys(look.notices)
            times.add(frame)
            if times.seconds[-1] >= length:
                break
        declared = (stream.duration or 0) * (stream.time_base or Fraction(0))
    if not times.seconds:
        raise BadRequest(f"{path} cannot be read as a video", got="a file of no frames", do=_DO)
    _require_length(path, times, video)
    picks, longer = _nearest(times.seconds, video), times.end > length
    notices = list(said)
    if times.counted:
        notices.append(f"its frames have no usable times: {float(times.rate or 0):g} fps assumed")
    if lost > _UNNOTICED:
        notices.append(f"{lost:.0%} of its picture is cut off, to fit {width}x{height}")
    if longer:
        whole = f" of {float(declared):.2f} s" if declared > length else ""
        notices.append(f"the first {float(length):.2f} s{whole} are used")
    if picks != tuple(range(video.frames)):
        notices.append(f"of its frames those nearest in time are taken, {video.fps} each second")
    return SourceVideo(
        path=path, picks=picks, seconds=length, longer=longer, notices=tuple(notices)
    )


def video_chunks(source: SourceVideo, width: int, height: int) -> Iterator[Tensor]:
    """Yield the frames of the clip as the encoder takes them, decoding as they are asked for.

    Yields:
        [3, 1, height, width] fp32 in [-1, 1], then [3, 4, height, width].

    Raises BadRequest where the file has changed or cannot be read any more.
    """
    waiting: list[Tensor] = []
    wanted = 1
    for pixels in _frames(source, width, height):
        waiting.append(pixels)
        if len(waiting) == wanted:
            yield torch.stack(waiting, dim=1)
            waiting, wanted = [], VAE_STRIDE[0]


def _frames(source: SourceVideo, width: int, height: int) -> Iterator[Tensor]:
    """Yield every frame of the clip, [3, height, width]."""
    left, turn = list(reversed(source.picks)), None
    with opened(source.path, _DO) as container:
        aspect = container.streams.video[0].sample_aspect_ratio
        for index, frame in enumerate(_decoded(container, source.path)):
            if not left:
                return
            turn = turn or read_turn(frame, source.path)
            if index == left[-1]:
                look = read_look(frame, aspect, turn, source.path)
                pixels = fitted(frame, look, width, height)
            while left and index == left[-1]:
                left.pop()
                yield pixels
    if left:
        raise BadRequest(
            f"{source.path} has changed while the clip was made",
            got="fewer frames than before",
            do="run the same command again, with the file left alone",
        )


def _decoded(container: av.container.InputContainer, path: Path) -> Iterator[av.VideoFrame]:
    """Yield the frames. Raises BadRequest for a damaged one."""
    for index, frame in enumerate(container.decode(video=0)):
        if frame.is_corrupt:
            raise BadRequest(f"{path} is damaged", got=f"frame {index + 1} has errors", do=_DO)
        yield frame


def _nearest(seconds: list[Fraction], video: VideoConfig) -> tuple[int, ...]:
    """Return for each frame of a clip the frame nearest in time; of two, the earlier one."""
    picks, index = [], 0
    for position in range(video.frames):
        time = Fraction(position, video.fps)
        while index + 1 < len(seconds) and seconds[index + 1] - time < abs(time - seconds[index]):
            index += 1
        picks.append(index)
    return tuple(picks)


def _require_length(path: Path, times: _Times, video: VideoConfig) -> None:
    """Raise BadRequest where the last frame of the clip comes after the end of the video."""
    last = Fraction(video.frames - 1, video.fps)
    if last < times.end:
        return
    if len(times.seconds) == 1:
        raise BadRequest(
            f"{path} is a single picture, not a video",
            got="1 frame",
            wanted=f"{video.frames} frames",
            do="give it to `pw generate --image`, which makes it the first frame of a clip",
        )
    fitting = 4 * ((math.ceil(times.end * video.fps) - 1) // 4) + 1
    rate = math.floor((video.frames - 1) / times.end) + 1
    raise BadRequest(
        f"{path} is shorter than the clip",
        got=f"{float(times.end):.3f} s",
        wanted=f"more than {float(last):.3f} s, for {video.frames} frames at {video.fps} fps",
        do=f"add --frames {fitting}, or --set video.fps={rate}, at which the clip ends sooner",
    )
