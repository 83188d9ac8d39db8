#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# PyAV: codec_context.name of a file's stream is the name of the decoder, not of the codec.
#
# A good guess: it is the codec's name as ffprobe prints it, "mp3" for MP3, since it is "aac" for AAC,
# "flac" for FLAC and "h264" for H.264.
# What happens: it is the name of the decoder that would be used. For most codecs the two are the same;
# for MP3 it is "mp3float", and for AV1 "libdav1d". The codec's own name is codec.canonical_name.
# Whom it hurts: everybody who decides by name whether a stream can be copied into a container: MP3
# sound is left out of an mp4 that takes it, and AV1 is not recognised.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet av==18.1.0 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import av
import numpy as np

print("av", av.__version__, {k: v for k, v in av.library_versions.items() if k == "libavcodec"})


def names(encoder):
    path = f"{sys.argv[1]}/{encoder}.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream(encoder, rate=48000 if encoder != "libsvtav1" else 24)
        if stream.type == "video":
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            frames = [av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")]
        else:
            stream.layout = "mono"
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 4608), np.float32), format="fltp", layout="mono"
            )
            silence.sample_rate = 48000
            size = stream.codec_context.frame_size or 1152
            frames = av.AudioResampler(stream.format, "mono", 48000, size).resample(silence)
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(path) as container:
        context = container.streams[0].codec_context
        return context.name, context.codec.canonical_name


found = {encoder: names(encoder) for encoder in ("aac", "flac", "libmp3lame", "libsvtav1")}
for encoder, (name, codec) in found.items():
    print(f"written by {encoder}: codec_context.name {name!r}, canonical_name {codec!r}")
assert found["aac"] == ("aac", "aac") and found["flac"] == ("flac", "flac")
assert found["libmp3lame"] == ("mp3float", "mp3")
assert found["libsvtav1"] == ("libdav1d", "av1")
PY
