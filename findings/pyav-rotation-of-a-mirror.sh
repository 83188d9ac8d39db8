#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# PyAV: frame.rotation of a mirrored video is half a turn, or nothing at all.
#
# A good guess: with frame.rotation every video can be shown upright.
# What happens: it is the angle of the display matrix, in which a mirror has no place. A video that is
# mirrored left to right, as front cameras write it, has rotation -180 as one that stands on its
# head has; one that is mirrored top to bottom has 0 as one without a matrix has.
# Whom it hurts: whoever turns frames by frame.rotation. We read the matrix itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet av==18.1.0 numpy==2.4.6
cat > "$work/turns.py" <<'PY'
import struct
import sys

import av
import numpy as np


def read(path, degrees, **mirrors):
    """Write a video that is to be shown turned or mirrored; return rotation and matrix."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(degrees, **mirrors)
        black = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(black))
        container.mux(stream.encode(None))
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        found = frame.side_data.get("DISPLAYMATRIX")
        a, b, _, c, d, *_ = (x >> 16 for x in struct.unpack("<9i", bytes(found)))
        return frame.rotation, (a, b, c, d)


path = sys.argv[1] + "/a.mp4"
print("PyAV", av.__version__)
turned, mirrored = read(path, 180), read(path, 0, hflip=True)
upside_down = read(path, 0, vflip=True)
for name, (rotation, matrix) in {
    "half a turn": turned, "left to right": mirrored, "top to bottom": upside_down
}.items():
    print(f"  {name}: rotation {rotation}, display matrix {matrix}")
assert turned[0] == mirrored[0] == -180, (turned, mirrored)
assert turned[1] != mirrored[1], (turned, mirrored)
assert upside_down[0] == 0 and upside_down[1] != (1, 0, 0, 1), upside_down
PY
"$work/venv/bin/python" "$work/turns.py" "$work"
