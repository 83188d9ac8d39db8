#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Pillow: convert("RGB") of a 16-bit grey picture is white, but for its darkest 256th.
#
# A good guess: image.convert("RGB"), the line that opens nearly every image-to-video program (the
# official Wan2.2 code too), gives the picture in 8 bits, as it does for 16-bit colour.
# What happens: a 16-bit grey PNG or TIFF (depth maps, scans, medical and satellite pictures) opens in
# mode "I;16", and convert cuts every value off at 255 in place of dividing by 257, with no warning.
# 16-bit colour is divided when it is read. Of TIFF files, moreover, Pillow applies the orientation
# itself while it loads, and reports the turned size before: who turns by the tag turns twice.
# Whom it hurts: everybody who starts a clip from such a picture; it is a white first frame.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet pillow==13.0.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import io

import numpy as np
import PIL
from PIL import Image

print("Pillow", PIL.__version__)


def reopened(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


values = np.array([[0, 128, 255, 256, 4096, 32768, 65535]], np.uint16)
for kind in ("PNG", "TIFF"):
    grey = reopened(Image.fromarray(values), kind)
    got = np.asarray(grey.convert("RGB"))[0, :, 0]
    print(f"{kind}, mode {grey.mode}: {values[0].tolist()} -> {got.tolist()}")
    print(f"   wanted {np.round(values[0] / 257).astype(int).tolist()}")
    assert got.tolist() == [0, 128, 255, 255, 255, 255, 255], "it is scaled now"

exif = Image.Exif()
exif[0x0112] = 6  # a quarter turn
for kind, expected in (("JPEG", (64, 40)), ("PNG", (64, 40)), ("TIFF", (40, 64))):
    image = reopened(Image.new("RGB", (64, 40)), kind, exif=exif)
    print(f"{kind} of 64x40 with orientation 6: size {image.size}, tag {image.getexif().get(0x0112)}")
    assert image.size == expected, "TIFF is as the others now"
PY
