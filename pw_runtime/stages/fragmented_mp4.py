# SPDX-License-Identifier: Apache-2.0
"""A video that can be watched while it is encoded: its packets, copied to a fragmented mp4."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import av
from av.video.stream import VideoStream

PARTIAL: Final = ".partial"  # before the ending of the file to watch
# Fragments of half a second, each on disk as soon as it is complete. The header waits for the first
# fragment: without it, the reordering of B-frames would shift all timestamps.
_OPTIONS: Final = {
    "movflags": "empty_moov+delay_moov+default_base_moof",
    "frag_duration": "500000",
    "flush_packets": "1",
}


def partial_path(path: Path) -> Path:
    """Return the path of the video to watch while `path` is being encoded."""
    return path.with_name(f"{path.stem}{PARTIAL}{path.suffix}")


class FragmentedMp4:
    """A second file of the same packets; nothing is encoded twice.

    All methods raise av.FFmpegError.
    """

    def __init__(self, path: Path, stream: VideoStream, tag: str | None) -> None:
        path.unlink(missing_ok=True)  # left by an earlier run; libav truncates it only later
        self._container = av.open(os.fspath(path), "w", format="mp4", options=dict(_OPTIONS))
        self._stream = self._container.add_stream_from_template(stream)
        if tag is not None:
            self._stream.codec_context.codec_tag = tag

    def add(self, packet: av.Packet[Any]) -> None:
        """Write a copy of a packet; call it before the muxer takes the packet itself."""
        copy = av.Packet(bytes(packet))
        copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
        copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
        copy.stream = self._stream
        self._container.mux(copy)

    def close(self) -> None:
        """Write the last fragment and close the file."""
        self._container.close()
