#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# PyAV with libx264: the number of threads changes the decoded pictures, unless one attribute is set.
#
# A good guess: threads make an encoder faster, and x264 is deterministic: with 1, 2 or 4 threads the
# pictures that come back are the same (with the ffmpeg program they are).
# What happens: PyAV asks for slice threads by default, so every thread gets a slice of its own; the
# slices change prediction and rate control, and the decoded frames differ with the number of
# threads, that is, from machine to machine. With thread_type = AUTO (frame threads, which is what the
# ffmpeg program uses) the frames are equal for every number.
# Whom it hurts: everybody who compares videos of two machines, or caches by content; it costs bits too.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet av==18.1.0 numpy==2.4.6
"$work/venv/bin/python" - "$work" <<'PY'
import sys

import av
import numpy as np
from av.codec.context import ThreadType

print("av", av.__version__, {k: v for k, v in av.library_versions.items() if k == "libavcodec"})
random = np.random.default_rng(0)
base = random.integers(0, 255, (136, 248, 3), dtype=np.uint8)
frames = [np.roll(base, 3 * i, axis=1) // 2 + 60 for i in range(12)]


def decoded(threads, kind):
    path = f"{sys.argv[1]}/{threads}.mp4"
    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 240, 128, "yuv420p"
        stream.codec_context.thread_count = threads
        if kind is not None:
            stream.codec_context.thread_type = kind
        for array in frames:
            picture = np.ascontiguousarray(array[:128, :240])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    with av.open(path) as back:
        return np.stack([frame.to_ndarray(format="gray") for frame in back.decode(video=0)])


default = {n: decoded(n, None) for n in (1, 2, 4)}
auto = {n: decoded(n, ThreadType.AUTO) for n in (1, 2, 4)}
for name, results in (("default", default), ("AUTO", auto)):
    far = {n: int(np.abs(results[n].astype(int) - results[1]).max()) for n in (2, 4)}
    print(f"thread_type {name}: largest difference of luma to one thread: {far}")
assert not (default[1] == default[4]).all(), "the default no longer changes pictures"
assert all((auto[1] == auto[n]).all() for n in (2, 4))
PY
