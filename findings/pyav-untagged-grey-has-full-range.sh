#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# libswscale (through PyAV): grey frames without a range are in full range, YUV ones in limited range.
#
# A good guess: what does not name its range is in one and the same range, limited, as video is: the
# luma of a yuv420p frame is copied when it becomes grey.
# What happens: from untagged yuv420p to gray the luma is stretched, 16 to 0 and 235 to 255, and back it
# is squeezed; neither frame says so afterwards, their color_range stays 0. Luma taken by hand (the
# first plane) and by conversion to "gray" are different numbers.
# Whom it hurts: everybody who reads grey video (masks, depth, lossless FFV1), or takes luma by
# conversion for a comparison: PSNR of such frames is off by the stretch, and blacks are crushed
# where untagged grey is read as limited.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet av==18.1.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import av
import numpy as np

print("av", av.__version__, {k: v for k, v in av.library_versions.items() if k == "libswscale"})
levels = np.array([16, 126, 235], np.uint8)
planes = np.full((96, 96), 128, np.uint8)  # 64 rows of luma, then chroma without colour
planes[:64] = np.repeat(levels, 32)
frame = av.VideoFrame.from_ndarray(planes, "yuv420p")
grey = frame.reformat(format="gray")
back = grey.reformat(format="yuv420p")
shown = [x.to_ndarray()[0, 8::32].tolist() for x in (frame, grey, back)]
print("color_range:", [int(x.color_range) for x in (frame, grey, back)])
print(f"luma {shown[0]} -> gray {shown[1]} -> luma {shown[2]}")
assert [int(x.color_range) for x in (frame, grey, back)] == [0, 0, 0], "the range is told now"
assert shown[0] == [16, 126, 235] and shown[1][0] == 0 and shown[1][2] == 255
assert shown[2][0] == 16 and shown[2][2] == 235
PY
