# SPDX-License-Identifier: Apache-2.0
"""A video that can be watched while it is made: copies of its packets in a fragmented mp4."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import av
from av.video.stream import VideoStream

# Pieces of half a second, each on the disk when it is complete. The header waits for the first
# one, else the decoding order of B-frames would shift all times.
_OPTIONS: Final = {
    "movflags": "empty_moov+delay_moov+default_base_moof",
    "frag_duration": "500000",
    "flush_packets": "1",
}


def partial_path(path: Path) -> Path:
    """Where a video that will be `path` can be watched while it grows."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class FragmentedMp4:
    """The second file of an encoder; nothing is encoded for it.

    Opening, adding and closing raise av.FFmpegError.
    """

    def __init__(self, path: Path, stream: VideoStream, tag: str | None) -> None:
        path.unlink(missing_ok=True)  # of an earlier run; libav empties it with the first piece
        self._container = av.open(os.fspath(path), "w", format="mp4", options=dict(_OPTIONS))
        self._stream = self._container.add_stream_from_template(stream)
        if tag is not None:
            self._stream.codec_context.codec_tag = tag

    def add(self, packet: av.Packet[Any]) -> None:
        """Write a copy of a packet of the encoder, before a muxer takes the packet itself."""
        copy = av.Packet(bytes(packet))
        copy.pts, copy.dts, copy.duration = packet.pts, packet.dts, packet.duration
        copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
        copy.stream = self._stream
        self._container.mux(copy)

    def close(self) -> None:
        """Write what is left."""
        self._container.close()
