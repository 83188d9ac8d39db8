# SPDX-License-Identifier: Apache-2.0
"""Frames -> one video file, encoded in a separate thread while the next frames are decoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import av
import numpy as np
import torch
from av.codec.context import ThreadType
from av.container import OutputContainer
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    VideoReformatter,
)
from av.video.stream import VideoStream

from pw_runtime.errors import WriteFailed
from pw_runtime.stages.codecs import RECIPES, Recipe, check_codec, encoder_options
from pw_runtime.stages.fragmented_mp4 import FragmentedMp4
from pw_runtime.stages.picture import write_png
from pw_runtime.system.atomic_files import atomic_file, require_replaceable, write_failed
from pw_runtime.system.overlap import overlap
from pw_runtime.system.sound_copy import add_sound, copy_sound
from pw_runtime.system.trace import span
from pw_runtime.types import Codec, FrameChunk, PixelFormat

MATRIX_RGB: Final = 0  # AVCOL_SPC_RGB, for which PyAV has no name
NO_TAGS: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFile:
    """A complete video file: its size, and its SHA-256 as 64 hex digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    width: int  # pixels
    height: int
    frames: int
    fps: int
    tags: Mapping[str, str]


def write_video(
    chunks: Iterable[FrameChunk],
    path: Path,
    *,
    width: int,
    height: int,
    frames: int,
    fps: int,
    codec: Codec,
    tags: Mapping[str, str] = NO_TAGS,
    partial_video: Path | None = None,
    audio: Path | None = None,
) -> VideoFile:
    """Encode a video into `path`; return its size and digest. See `encoded_video`."""
    with encoded_video(
        chunks,
        path,
        width=width,
        height=height,
        frames=frames,
        fps=fps,
        codec=codec,
        tags=tags,
        partial_video=partial_video,
        audio=audio,
    ) as written:
        return written


@contextmanager
def encoded_video(
    chunks: Iterable[FrameChunk],
    path: Path,
    *,
    width: int,
    height: int,
    frames: int,
    fps: int,
    codec: Codec,
    tags: Mapping[str, str] = NO_TAGS,
    partial_video: Path | None = None,
    audio: Path | None = None,
) -> Iterator[VideoFile]:
    """Encode `frames` frames of `width` x `height` pixels; yield the file's size and digest.

    Inside the block the file is complete, but has a temporary name; it becomes `path` when the
    block ends well, and is removed otherwise.

    h264, hevc and av1 are BT.709 limited-range yuv420p in an mp4 that starts playing before it is
    completely loaded; ffv1 is lossless RGB in Matroska. libswscale converts chunks of rgb24 to
    that; chunks of yuv420p go to the encoder unchanged. png is one lossless RGB frame. The encoder
    runs in a separate thread while `chunks` produces the next one; at most three chunks are alive,
    including the one in production. Equal frames with equal tags give equal files
    (docs/numerics.md).

    `tags` are the file's metadata by their names in libavformat: title, comment, description. Their
    text must have no NUL, which would end it.

    `partial_video`, for the mp4 codecs, gets the same packets as a fragmented mp4, which any player
    can open in the meantime. It is removed once `path` is complete, and stays when writing fails.
    The sound of the file `audio` is copied into `path`.

    Raises WriteFailed when the disk or the encoder fails, ValueError when the chunks are not the
    announced frames, BadRequest for a codec that is not available or cannot be fragmented. Errors
    of `chunks` are passed on.
    """
    check_codec(codec, frames=frames, fragmented=partial_video is not None)
    clip = _Format(width=width, height=height, frames=frames, fps=fps, tags=tags)
    if partial_video is not None:
        require_replaceable(partial_video)
    with atomic_file(path) as partial:
        try:
            overlap(
                chunks,
                lambda ready: _encode(ready, partial, RECIPES[codec], clip, partial_video, audio),
            )
            packets = _packets(partial)
        except av.FFmpegError as error:
            raise write_failed(path, error) from error
        if packets != frames:
            raise WriteFailed(
                f"{path} is incomplete",
                got=f"{packets} frames in the file",
                wanted=f"{frames} frames",
                do="run the same command again, with another codec if it happens again",
            )
        # At the end, because the muxer moves the index of an mp4 to its front.
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        yield VideoFile(bytes=partial.stat().st_size, sha256=digest)
    if partial_video is not None:
        partial_video.unlink(missing_ok=True)


def _encode(
    chunks: Iterable[FrameChunk],
    path: Path,
    recipe: Recipe,
    clip: _Format,
    partial_video: Path | None = None,
    audio: Path | None = None,
) -> None:
    if recipe.encoder is None:
        for pixels in _pictures(chunks, clip):
            with span("encode"):
                write_png(pixels, path, clip.tags)
        return
    mp4 = recipe.suffix == ".mp4"
    container = av.open(
        os.fspath(path),
        "w",
        format="mp4" if mp4 else "matroska",
        # A Matroska file has random identifiers unless it is to be bit-exact.
        options={"movflags": "+faststart"} if mp4 else {"fflags": "+bitexact"},
    )
    container.metadata.update(clip.tags)
    copy: FragmentedMp4 | None = None
    try:
        stream = _open_stream(container, recipe, clip, audio)
        if partial_video is not None:
            copy = FragmentedMp4(partial_video, stream, recipe.tag)
        for frame in _video_frames(chunks, clip, recipe.pix_fmt):
            with span("encode"):
                _mux(stream.encode(frame), container, copy)
            del frame  # it may use memory of the chunk
        with span("encode"):
            _mux(stream.encode(), container, copy)
        with span("mux"):
            if copy is not None:
                copy.close()
            container.close()
    except BaseException:
        # The file is discarded; a second error from closing it would hide the first.
        for output in (copy, container):
            with suppress(av.FFmpegError):
                if output is not None:
                    output.close()
        raise


def _mux(
    packets: Iterable[av.Packet[Any]], container: OutputContainer, copy: FragmentedMp4 | None
) -> None:
    for packet in packets:
        if copy is not None:
            copy.add(packet)
        container.mux(packet)


def _open_stream(
    container: OutputContainer, recipe: Recipe, clip: _Format, audio: Path | None
) -> VideoStream:
    assert recipe.encoder is not None
    stream = container.add_stream(recipe.encoder, rate=clip.fps, options=encoder_options(recipe))
    assert isinstance(stream, VideoStream)
    stream.width, stream.height = clip.width, clip.height
    stream.pix_fmt = recipe.pix_fmt
    context = stream.codec_context
    # PyAV's default of one slice per thread costs bits: x264 makes 4 % more with 16 threads.
    context.thread_type = ThreadType.AUTO
    rgb = recipe.pix_fmt == "bgr0"
    context.color_range = ColorRange.JPEG if rgb else ColorRange.MPEG
    context.colorspace = MATRIX_RGB if rgb else Colorspace.ITU709
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    if recipe.tag is not None:
        context.codec_tag = recipe.tag
    if audio is not None:
        add_sound(container, audio)
    with _svt_banner_off():
        container.start_encoding()
    if audio is not None:
        copy_sound(container, audio)
    return stream


@contextmanager
def _svt_banner_off() -> Iterator[None]:
    """Keep SVT-AV1 from printing its settings to stderr, which bypasses libav's log.

    The only switch is an environment variable, read once, when the first encoder opens. A value
    set by the user is respected.
    """
    if "SVT_LOG" in os.environ:
        yield
        return
    os.environ["SVT_LOG"] = "1"  # errors are still printed
    try:
        yield
    finally:
        del os.environ["SVT_LOG"]


def _video_frames(
    chunks: Iterable[FrameChunk], clip: _Format, pix_fmt: str
) -> Iterator[av.VideoFrame]:
    converter = VideoReformatter()
    position = 0
    for chunk in chunks:
        _check_chunk(chunk, position, clip, pix_fmt)
        for pixels in chunk.frames:
            frame = _video_frame(converter, pixels.numpy(), chunk.pixel_format, pix_fmt)
            frame.pts = position
            position += 1
            yield frame
        del chunk, pixels, frame  # free this chunk while the next one is produced
    _require_all(position, clip)


def _pictures(chunks: Iterable[FrameChunk], clip: _Format) -> Iterator[np.ndarray]:
    """Yield the pixels of frames in RGB, [height, width, 3] uint8."""
    position = 0
    for chunk in chunks:
        _check_chunk(chunk, position, clip, "rgb24")
        for pixels in chunk.frames:
            position += 1
            yield pixels.numpy()
    _require_all(position, clip)


def _require_all(position: int, clip: _Format) -> None:
    if position != clip.frames:
        raise ValueError(f"the frames ended after {position} of {clip.frames}")


def _check_chunk(chunk: FrameChunk, position: int, clip: _Format, pix_fmt: str) -> None:
    if chunk.pixel_format not in ("rgb24", pix_fmt):
        raise ValueError(f"a chunk is {chunk.pixel_format}, expected rgb24 or {pix_fmt}")
    shape = tuple(chunk.frames.shape)
    rgb = chunk.pixel_format == "rgb24"
    picture = (clip.height, clip.width, 3) if rgb else (clip.height * 3 // 2, clip.width)
    if chunk.start != position:
        raise ValueError(f"a chunk starts at frame {chunk.start}, expected {position}")
    if not shape or shape[0] == 0 or shape[1:] != picture:
        raise ValueError(f"a chunk has shape {shape}, expected (1 or more, {str(picture)[1:]}")
    dtype, device = chunk.frames.dtype, chunk.frames.device
    if dtype != torch.uint8 or device.type != "cpu":
        raise ValueError(f"a chunk is {dtype} on {device}, expected torch.uint8 on cpu")
    if position + shape[0] > clip.frames:
        raise ValueError(f"{position + shape[0]} frames or more, expected {clip.frames} in all")


def _video_frame(
    converter: VideoReformatter, pixels: np.ndarray, pixel_format: PixelFormat, pix_fmt: str
) -> av.VideoFrame:
    """Convert the pixels of one frame of a `FrameChunk` to the encoder's format."""
    if pixel_format == pix_fmt:
        frame = av.VideoFrame.from_numpy_buffer(pixels, format=pix_fmt)  # no copy
        frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
        return frame
    frame = av.VideoFrame.from_ndarray(pixels, format=pixel_format)
    if pix_fmt == "bgr0":
        return converter.reformat(frame, format=pix_fmt)
    return converter.reformat(
        frame,
        format=pix_fmt,
        # libswscale uses BT.601 unless both matrices are given.
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
    )


def _packets(path: Path) -> int:
    """Count the video packets of a finished file (one per frame) without decoding them."""
    with av.open(os.fspath(path)) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)
