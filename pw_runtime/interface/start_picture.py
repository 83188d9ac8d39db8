# SPDX-License-Identifier: Apache-2.0
"""The picture that a call starts from, as a file: every run reads files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pw_runtime.errors import BadRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    StartPicture = str | Path | Image.Image | NDArray[np.uint8]

_SAVED = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes that PNG has


@contextmanager
def picture_file(image: object) -> Iterator[Path | None]:
    """Yield the path of a picture; one from memory is a PNG file until the block ends.

    Args:
        image: a path, an image of Pillow, [H, W, 3] uint8, or None, which has no path.

    Raises:
        BadRequest: it is something else.
    """
    from PIL import Image
    from PIL.ExifTags import Base

    if image is None or isinstance(image, str | Path):
        yield None if image is None else Path(image)
        return
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise BadRequest(
                "image is an array of another kind",
                got=f"{image.dtype} {list(image.shape)}",
                wanted="uint8 [height, width, 3], red first",
                do="convert it, or pass the path of a file",
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        wanted = "a path, an image of Pillow, or an array [height, width, 3] of uint8"
        raise BadRequest("image has a wrong type", got=f"{image!r:.80}", wanted=wanted)
    if image.mode not in _SAVED:
        raise BadRequest(
            "image has pixels of a kind that no PNG file has",
            got=image.mode,
            wanted=", ".join(_SAVED),
            do='convert it: image.convert("RGB")',
        )
    with tempfile.TemporaryDirectory(prefix="pw-picture-") as folder:
        path = Path(folder) / "picture.png"
        image.load()  # of TIFF, Pillow turns the pixels then, and takes the tag out
        exif = Image.Exif()
        if (turned := image.getexif().get(Base.Orientation)) is not None:
            exif[Base.Orientation] = turned
        image.save(path, exif=exif)
        yield path
