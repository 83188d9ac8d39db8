# SPDX-License-Identifier: Apache-2.0
"""Copy the sound of one video file into another, packet by packet: nothing is encoded again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import av
from av.container import InputContainer, OutputContainer

from pw_runtime.system.video_input import opened

AGREES: Final = Fraction(1, 10)  # seconds by which a sound may end before or after its clip
# Codecs that players expect in a container.
_TAKEN: Final = MappingProxyType(
    {
        ".mp4": frozenset({"aac", "mp3", "opus", "ac3", "eac3", "flac", "alac"}),
        ".mkv": frozenset(
            {"aac", "mp3", "opus", "ac3", "eac3", "flac", "alac", "vorbis", "dts", "truehd"}
            | {"pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le"}
        ),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """The first track of sound of a file.

    Attributes:
        codec: as libavcodec names it, whatever decodes it.
        end: seconds from the first picture to its end; where it is longer than what was asked
            about, no more than that it is.
        tracks: of sound, in the file.
    """

    codec: str
    end: Fraction
    tracks: int


def find_sound(path: Path, seconds: Fraction) -> Sound | None:
    """Return the sound of a file, read as far as to tell whether it is longer than `seconds`.

    Raises BadRequest where the file cannot be read.
    """
    with opened(path) as container:
        if not container.streams.audio:
            return None
        stream, end = container.streams.audio[0], Fraction(0)
        codec = "" if stream.codec_context is None else stream.codec_context.codec.canonical_name
        for packet, time in _packets(container):
            end = max(end, time + (packet.duration or 0) * packet.time_base)
            if end > seconds + AGREES:
                break
        return Sound(codec=codec, end=end, tracks=len(container.streams.audio))


def why_left_out(sound: Sound, seconds: Fraction, suffix: str) -> str | None:
    """Return why a clip of a length, in a container, is made without the sound; None: with it."""
    if abs(sound.end - seconds) > AGREES:
        longer = sound.end > seconds
        length = "longer" if longer else f"{float(sound.end):.2f} s"
        return f"its sound is left out: it is {length}, and the clip lasts {float(seconds):.2f} s"
    if sound.codec not in _TAKEN.get(suffix, frozenset()):
        return f"its sound is left out: {suffix} files do not take {sound.codec or 'its codec'}"
    return None


def add_sound(container: OutputContainer, path: Path) -> None:
    """Add a stream for the sound of `path` to a file, before anything is written into it."""
    with av.open(os.fspath(path)) as source:
        container.add_stream_from_template(source.streams.audio[0])


def copy_sound(container: OutputContainer, path: Path) -> None:
    """Write the sound into the stream that was added for it; the muxer sorts it among pictures."""
    target = container.streams.audio[0]
    with av.open(os.fspath(path)) as source:
        for packet, time in _packets(source):
            shift = packet.pts - round(time / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = target
            container.mux(packet)


def _packets(container: InputContainer) -> Iterator[tuple[Any, Fraction]]:
    """Yield the packets of the first track of sound, with seconds from the first picture."""
    video = container.streams.video[0]
    origin = (video.start_time or 0) * (video.time_base or Fraction(0))
    for packet in container.demux(container.streams.audio[0]):
        if packet.pts is not None and packet.dts is not None and packet.time_base is not None:
            yield packet, packet.pts * packet.time_base - origin
