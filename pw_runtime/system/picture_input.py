# SPDX-License-Identifier: Apache-2.0
"""Read pictures that anyone may have made, as the 8-bit sRGB that the VAE was trained with.

What a file says about itself is followed (orientation, colour profile, transparency), and told.
What has no one meaning (several frames, 32-bit numbers) is refused.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from pw_runtime.errors import BadRequest
from pw_runtime.system.input_files import UnreadableInput, read_input

if TYPE_CHECKING:
    from torch import Tensor

FORMATS: Final = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
MAX_BYTES: Final = 256 * 2**20
MAX_PIXELS: Final = 100_000_000  # 300 MB when decoded
SMALLEST: Final = 32  # pixels of a side: a token
CUT: Final = 0.1  # share of a picture that may be cropped without a word
_WANTED: Final = "a PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF, PPM or JPEG 2000 file with one picture"
_GREY_16: Final = ("I;16", "I;16L", "I;16B", "I;16N")
_COLOURS: Final = {  # by mode: what is told of the conversion, if anything
    "RGB": None,
    "RGBA": None,
    "RGBX": None,
    "P": None,
    "PA": None,
    "1": None,
    "L": None,
    "LA": None,
    "YCbCr": None,
    "CMYK": "converted from CMYK, which has no colour profile: other programs do it differently",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture: upright, RGB, and what was done to it in words for the user."""

    image: Image.Image
    notes: tuple[str, ...] = ()  # each follows "the picture was"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.image.size


def read_picture(path: Path) -> Picture:
    """Read a picture. Raises BadRequest as `decode_picture` does."""
    return decode_picture(read_bytes(path), str(path))


def picture_size(path: Path) -> tuple[int, int]:
    """Return width and height of a picture as it is shown, from the head of its file.

    Raises BadRequest as `decode_picture` does.
    """
    with _opened(read_bytes(path), str(path)) as image:
        width, height = image.size
        # Of TIFF, Pillow has turned the size already.
        turned = _orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"
    return (height, width) if turned else (width, height)


def read_bytes(path: Path) -> bytes:
    """Return the content of a picture's file. Raises BadRequest where it cannot be read."""
    try:
        return read_input(path, MAX_BYTES)
    except UnreadableInput as error:
        raise BadRequest(
            f"cannot read the picture {path}", got=error, do="check its path and its permissions"
        ) from error


def decode_picture(content: bytes, name: str) -> Picture:
    """Decode a picture.

    Args:
        content: of a file of one of FORMATS.
        name: of the file, for messages.

    Raises:
        BadRequest: damaged, of another format, too large, too small, or several pictures.
    """
    with _opened(content, name) as image:
        # Before it is loaded: of TIFF, Pillow turns the pixels then and forgets why.
        orientation = _orientation(image)
        image.load()
        return _as_rgb(image, orientation, name)


@contextmanager
def _opened(content: bytes, name: str) -> Iterator[Image.Image]:
    """Open a picture; what goes wrong inside the block is wrong with it, and a BadRequest."""
    if not content:
        raise _unusable(name, "an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # why: checked below
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _require_one_of_usable_size(image, name)
                yield image
    except (BadRequest, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise _unusable(name, "no picture of a known format") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, "far more pixels") from error
    except Exception as error:  # why: decoders of damaged files raise what they like
        raise _unusable(name, f"a damaged file ({_first_line(error)})") from error


def fit_picture(picture: Picture, width: int, height: int) -> Tensor:
    """Resize a picture to cover a size, and crop it from the centre, as officially.

    Source: wan/textimage2video.py (i2v).

    Returns:
        [3, 1, height, width] fp32 in [-1, 1].
    """
    import torch  # here: a server that only checks pictures does without it

    resized = _covering(picture.size, width, height)
    image = picture.image.resize(resized, Image.Resampling.LANCZOS)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    pixels = np.array(image.crop((left, top, left + width, top + height)))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[:, None]
    return x.float().div(255).sub(0.5).div(0.5).contiguous()


def crop_notes(picture: Picture, width: int, height: int) -> tuple[str, ...]:
    """Return what to tell about a crop to a size, where it cuts much of a picture."""
    columns, rows = _covering(picture.size, width, height)
    cut = 1 - width * height / (columns * rows)
    if cut <= CUT:
        return ()
    sides = "the sides" if columns > width else "top and bottom"
    shapes = f"it is {picture.size[0]}x{picture.size[1]}, the clip {width}x{height}"
    hint = "--size picture comes nearest to its shape"
    return (f"cut at {sides}, {cut:.0%} of it: {shapes} ({hint})",)


def _covering(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """Return the smallest size of this shape that covers another, rounded as officially."""
    scale = max(width / size[0], height / size[1])
    return round(size[0] * scale), round(size[1] * scale)


def _orientation(image: Image.Image) -> int:
    """Return the orientation of the EXIF data, 1 (upright) to 8."""
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def _require_one_of_usable_size(image: Image.Image, name: str) -> None:
    """Raise BadRequest for what should not even be decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width}x{height}")
    if min(width, height) < SMALLEST:
        raise _unusable(
            name,
            f"{width}x{height}",
            wanted=f"at least {SMALLEST} pixels in width and height",
            do="take a larger picture",
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # of a camera: the picture, and smaller ones of it
        raise _unusable(
            name,
            f"{frames} pictures in one {image.format} file",
            do="save one of them as PNG; a video goes to --draft-video",
        )


def _as_rgb(image: Image.Image, orientation: int, name: str) -> Picture:
    """Convert a loaded picture to upright, opaque, 8-bit sRGB."""
    notes = []
    if orientation > 1:
        image = ImageOps.exif_transpose(image)
        notes.append(f"turned upright, as its EXIF orientation {orientation} says")
    if image.mode in _GREY_16:
        image = _eight_bits(image)
        notes.append("converted from 16 to 8 bits")
    if image.mode not in _COLOURS:
        raise _unusable(
            name,
            f"pixels of kind {image.mode}, whose range of values is not known",
            wanted="8 or 16 bits per colour",
            do="save it as an 8-bit PNG",
        )
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours, note = _in_srgb(image)
    if note is not None:
        notes.append(note)
    if alpha is not None and alpha.getextrema()[0] < 255:  # type: ignore[operator]  # one channel
        colours = Image.composite(colours, Image.new("RGB", colours.size), alpha)
        notes.append("put on black, where it is transparent")
    return Picture(colours, tuple(notes))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion would cut values off at 255."""
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:  # one of 65,536 levels
        alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        grey = Image.merge("LA", (grey, alpha))
    if profile := image.info.get("icc_profile"):
        grey.info["icc_profile"] = profile
    return grey


def _in_srgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """Convert to RGB by the colour profile, where there is one; say what was done."""
    profile, told = image.info.get("icc_profile"), _COLOURS[image.mode]
    opaque = image.convert("L") if image.mode in ("1", "LA") else image
    if opaque.mode not in ("L", "CMYK"):
        opaque = opaque.convert("RGB")
    if not profile:
        return opaque.convert("RGB"), told
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        description = ImageCms.getProfileDescription(source).strip()
        if "srgb" in description.lower():
            return opaque.convert("RGB"), None
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(opaque, source, srgb, outputMode="RGB")
        assert converted is not None, "in place only where asked for"
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        why = f"taken as sRGB: its colour profile cannot be used ({_first_line(error)})"
        return opaque.convert("RGB"), why
    return converted, f"converted from the colours of its profile ({description}) to sRGB"


def _unusable(
    name: str,
    got: str,
    *,
    wanted: str = _WANTED,
    do: str = "open it in another program and save it as PNG",
) -> BadRequest:
    return BadRequest(f"the picture {name} cannot be used", got=got, wanted=wanted, do=do)


def _too_large(name: str, got: str) -> BadRequest:
    most = f"at most {MAX_PIXELS:,} pixels"
    return _unusable(name, got, wanted=most, do="make the picture smaller")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
