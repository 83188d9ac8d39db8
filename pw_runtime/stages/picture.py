# SPDX-License-Identifier: Apache-2.0
"""A frame -> a PNG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

_SRGB: Final = b"sRGB", bytes([0])  # the chunk that says so, with the intent "perceptual"


def write_png(pixels: np.ndarray, path: Path, tags: Mapping[str, str]) -> None:
    """Write a frame as a PNG, lossless and marked as sRGB; equal frames and tags give equal files.

    Args:
        pixels: [height, width, 3] uint8.
        path: of the file.
        tags: text by names that the format knows in capitals: Title, Description, Comment.

    Raises OSError where the disk refuses.
    """
    info = PngInfo()
    info.add(*_SRGB)
    for name, text in tags.items():
        info.add_itxt(name.capitalize(), text)
    Image.fromarray(pixels).save(path, format="PNG", pnginfo=info)
