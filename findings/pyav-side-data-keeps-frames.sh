#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# PyAV: a decoded frame whose side data was read stays in memory until Python collects garbage.
#
# A good guess: a frame is freed when the loop goes on to the next one, as without the look.
# What happens: frame.side_data refers to the frame and the frame to it. Frames pile up until the
# cycle collector runs, which counts Python's objects and not megabytes: reading the display matrix
# of every frame keeps them all, 3 MiB each at 1080p.
# Whom it hurts: whoever looks for rotation or HDR data frame by frame. We read the display matrix
# of the first frame.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet av==18.1.0 numpy==2.4.6
cat > "$work/frames.py" <<'PY'
import gc
import sys

import av
import numpy as np

COUNT, MIB = 120, 2**20
path = sys.argv[1] + "/a.mp4"
with av.open(path, "w") as container:
    stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
    stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
    black = av.VideoFrame.from_ndarray(np.zeros((1080, 1920, 3), np.uint8), format="rgb24")
    for index in range(COUNT):
        black.pts = index
        container.mux(stream.encode(black))
    container.mux(stream.encode(None))


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def growth(look):
    """Mebibytes that the process grows by from frame 20 to the last."""
    gc.collect()
    with av.open(path) as container:
        for index, frame in enumerate(container.decode(video=0)):
            look(frame)
            if index == 20:
                before = resident()
        return (resident() - before) / MIB


print("PyAV", av.__version__)
without, rotation = growth(lambda frame: None), growth(lambda frame: frame.rotation)
side_data = growth(lambda frame: frame.side_data.get("DISPLAYMATRIX"))
print(f"  nothing read: {without:.0f} MiB, frame.rotation: {rotation:.0f} MiB")
print(f"  frame.side_data: {side_data:.0f} MiB for {COUNT - 21} frames")
assert without < 20 and rotation < 20, (without, rotation)
assert side_data > 100, side_data
PY
"$work/venv/bin/python" "$work/frames.py" "$work"
