#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# PyAV: remuxing an HEVC file that Apple's players open makes one that they refuse.
#
# A good guess: copying packets with add_stream_from_template keeps what the file says of its codec,
# the four-letter sample entry included.
# What happens: an mp4 tagged hvc1 comes out tagged hev1 (mp4 to mp4, mp4 to mov), because the tag of
# the template is dropped and libavformat's default is hev1. Setting codec_tag again on the new
# stream keeps it.
# Whom it hurts: QuickTime, Safari and iOS play hvc1 only; a faststart or trim step after encoding
# silently makes a video unplayable there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet av==18.1.0 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import av
import numpy as np

print("av", av.__version__, {k: v for k, v in av.library_versions.items() if k == "libavformat"})
folder = sys.argv[1]


def tag(path):
    data = open(path, "rb").read()
    return [name for name in ("hvc1", "hev1") if name.encode() in data]


with av.open(f"{folder}/a.mp4", "w") as out:
    options = {"x265-params": "log-level=none"}
    stream = out.add_stream("libx265", rate=24, options=options)
    stream.width = stream.height = 64
    stream.pix_fmt = "yuv420p"
    stream.codec_context.codec_tag = "hvc1"
    for i in range(4):
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 40 * i, np.uint8), format="rgb24")
        out.mux(stream.encode(frame))
    out.mux(stream.encode())


def remux(target, keep_tag):
    with av.open(f"{folder}/a.mp4") as source, av.open(target, "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        if keep_tag:
            stream.codec_context.codec_tag = "hvc1"
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return tag(target)


print("encoded with codec_tag = hvc1:", tag(f"{folder}/a.mp4"))
for kind in ("mp4", "mov"):
    plain, kept = (remux(f"{folder}/b{keep}.{kind}", keep) for keep in (False, True))
    print(f"remuxed to {kind}: {plain}; with codec_tag set again: {kept}")
    assert plain == ["hev1"], "the tag survives now"
    assert kept == ["hvc1"]
PY
