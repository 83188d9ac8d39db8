# SPDX-License-Identifier: Apache-2.0
"""Pictures of all kinds: what they become, and what is refused in which words."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

from pw_runtime.errors import BadRequest
from pw_runtime.job.sources import require_usable_sources, source_of, unchanged_picture
from pw_runtime.presets import find_preset
from pw_runtime.system.picture_input import (
    MAX_PIXELS,
    Picture,
    crop_notes,
    decode_picture,
    fit_picture,
    picture_size,
    read_picture,
)
from pw_runtime.types import Prompt, Request, RunOptions

RGB = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
PICTURE = Image.fromarray(RGB)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image)


def chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def png(width: int, height: int, depth: int, colours: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_exact_formats_give_their_pixels(kind: str) -> None:
    picture = decode_picture(encoded(PICTURE, kind), "a file")
    assert np.array_equal(pixels(picture), RGB)
    assert picture.notes == ()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "JPEG2000", "GIF"])
def test_other_formats_are_read(kind: str) -> None:
    smooth = PICTURE.resize((8, 5)).resize((64, 40))
    picture = decode_picture(encoded(smooth, kind), "a file")
    error = np.abs(pixels(picture).astype(int) - np.asarray(smooth).astype(int)).mean()
    assert picture.size == (64, 40)
    assert error < 16


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_the_nearest_of_8_bits(kind: str) -> None:
    """Pillow's own conversion takes everything above 255 as white."""
    values = np.linspace(0, 65535, 40 * 64).astype(np.uint16).reshape(40, 64)
    picture = decode_picture(encoded(Image.fromarray(values), kind), "a file")
    expected = np.round(values / 257).astype(np.uint8)
    assert np.array_equal(pixels(picture), np.repeat(expected[..., None], 3, axis=2))
    assert picture.notes == ("converted from 16 to 8 bits",)


def test_16_bit_grey_keeps_what_its_file_says_of_it() -> None:
    values = np.full((40, 64), 65535, np.uint16)
    values[:20] = 65534  # the same level of 8 bits, and not the transparent one
    content = encoded(Image.fromarray(values), transparency=65535, icc_profile=b"nonsense")
    picture = decode_picture(content, "a file")
    assert np.array_equal(pixels(picture)[:, 0, 0], [255] * 20 + [0] * 20)
    assert any("put on black" in note for note in picture.notes)
    assert any("colour profile cannot be used" in note for note in picture.notes)


def test_16_bit_colours_keep_their_range() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (40, 64, 3)).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    picture = decode_picture(png(64, 40, 16, 2, rows), "a file")
    assert np.abs(pixels(picture) - values / 257).max() < 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_grey_and_palettes_and_opaque_alpha_need_no_word(mode: str) -> None:
    image = PICTURE.convert(mode)
    picture = decode_picture(encoded(image), "a file")
    assert np.array_equal(pixels(picture), np.asarray(image.convert("RGB")))
    assert picture.notes == ()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_put_on_black(mode: str) -> None:
    options: dict[str, object] = {}
    if mode == "P":
        image = PICTURE.quantize(16)
        options["transparency"] = 3
        expected = np.asarray(image.convert("RGB")) * (np.asarray(image) != 3)[..., None]
    else:
        image = PICTURE.convert(mode)
        image.putalpha(Image.fromarray(RGB[..., 0]))
        share = RGB[..., :1] / 255
        expected = np.asarray(image.convert("RGB")) * share
    picture = decode_picture(encoded(image, **options), "a file")
    assert np.abs(pixels(picture) - expected).max() <= 0.51
    assert picture.notes == ("put on black, where it is transparent",)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_and_told(kind: str) -> None:
    image = PICTURE.resize((4, 4)).resize((64, 40)).convert("CMYK")
    picture = decode_picture(encoded(image, kind), "a file")
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(pixels(picture) - expected).mean() < 8
    assert "converted from CMYK" in picture.notes[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_pictures_are_turned_upright(tmp_path: Path, orientation: int, kind: str) -> None:
    transposes = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = decode_picture(encoded(PICTURE, kind, exif=exif), "a file")
    upright = PICTURE.transpose(transposes[orientation]) if orientation > 1 else PICTURE
    assert np.array_equal(pixels(picture), np.asarray(upright))
    assert bool(picture.notes) == (orientation > 1)
    path = tmp_path / "start"
    path.write_bytes(encoded(PICTURE, kind, exif=exif))
    assert picture_size(path) == picture.size


def odd_profile() -> bytes:
    """Return the profile of sRGB with red and blue exchanged."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", content[128:132])[0]
    places = {}
    for index in range(count):
        name, start, size = struct.unpack(">4sII", content[132 + 12 * index : 144 + 12 * index])
        places[name] = (start, size)
    red, blue = (content[places[n][0] : sum(places[n])] for n in (b"rXYZ", b"bXYZ"))
    content[places[b"rXYZ"][0] : sum(places[b"rXYZ"])] = blue
    content[places[b"bXYZ"][0] : sum(places[b"bXYZ"])] = red
    start, size = places[b"desc"]
    return (
        bytes(content[:start])
        + bytes(content[start : start + size]).replace(
            "sRGB".encode("utf-16-be"), "Odd ".encode("utf-16-be")
        )
        + bytes(content[start + size :])
    )


def test_an_embedded_colour_profile_is_followed() -> None:
    picture = decode_picture(encoded(PICTURE, icc_profile=odd_profile()), "a file")
    swapped = RGB[..., ::-1].astype(int)
    assert np.abs(pixels(picture) - swapped).mean() < 2
    assert "colours of its profile (Odd" in picture.notes[0]


def test_a_profile_of_srgb_changes_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = decode_picture(encoded(PICTURE, icc_profile=srgb), "a file")
    assert np.array_equal(pixels(picture), RGB)
    assert picture.notes == ()


def test_a_broken_profile_is_told_and_left_out() -> None:
    picture = decode_picture(encoded(PICTURE, icc_profile=b"nonsense"), "a file")
    assert np.array_equal(pixels(picture), RGB)
    assert "taken as sRGB: its colour profile cannot be used" in picture.notes[0]


def of_frames(kind: str) -> Callable[[], bytes]:
    return lambda: encoded(PICTURE, kind, save_all=True, append_images=[PICTURE.rotate(180)])


def cut(kind: str) -> Callable[[], bytes]:
    return lambda: encoded(PICTURE.resize((640, 400)), kind)[:2000]


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "an empty file"),
    "text": (lambda: b"a red ball", "no picture of a known format"),
    "animated GIF": (of_frames("GIF"), "2 pictures in one GIF file"),
    "animated WebP": (of_frames("WEBP"), "2 pictures in one WEBP file"),
    "animated PNG": (of_frames("PNG"), "2 pictures in one PNG file"),
    "pages": (of_frames("TIFF"), "2 pictures in one TIFF file"),
    "cut PNG": (cut("PNG"), "a damaged file"),
    "cut JPEG": (cut("JPEG"), "a damaged file"),
    "cut WebP": (cut("WEBP"), "a damaged file"),
    "damaged": (lambda: encoded(PICTURE)[:60] + b"x" * 40, "a damaged file"),
    "narrow": (lambda: encoded(PICTURE.resize((31, 400))), "31x400"),
    "bomb": (lambda: png(60000, 60000, 8, 2, b"\0" * 99), f"at most {MAX_PIXELS:,} pixels"),
    "large": (lambda: png(12000, 10000, 8, 2, b"\0" * 99), "12000x10000"),
    "no pixels": (lambda: png(0, 0, 8, 2, b""), "no picture of a known format"),
    "32 bits": (lambda: encoded(Image.fromarray(RGB[..., 0].astype("i4")), "TIFF"), "of kind I"),
    "floats": (lambda: encoded(Image.fromarray(RGB[..., 0].astype("f4")), "TIFF"), "of kind F"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_first_frame_is_refused_in_one_message(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(BadRequest) as refused:
        decode_picture(make(), "start.png")
    text = str(refused.value)
    assert text.startswith("the picture start.png cannot be used")
    assert words in text
    assert all(part in text for part in ("got:", "wanted:", "do this:"))


def test_the_first_picture_of_a_camera_with_two_lenses_is_taken() -> None:
    content = encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(180)])
    picture = decode_picture(content, "a file")
    expected = decode_picture(encoded(PICTURE, "JPEG"), "a file")
    assert np.array_equal(pixels(picture), pixels(expected))


def official_first_frame(image: Image.Image, ow: int, oh: int) -> Tensor:
    """Resize and crop as wan/textimage2video.py (i2v) does."""
    scale = max(ow / image.width, oh / image.height)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
    )
    x1, y1 = (image.width - ow) // 2, (image.height - oh) // 2
    image = image.crop((x1, y1, x1 + ow, y1 + oh))
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return values.sub_(0.5).div_(0.5).unsqueeze(1)


@pytest.mark.parametrize("size", [(64, 40), (63, 41), (500, 333), (90, 1000), (448, 256)])
@pytest.mark.parametrize("clip", [(96, 64), (64, 96), (448, 256)])
def test_the_first_frame_is_the_official_one(size: tuple[int, int], clip: tuple[int, int]) -> None:
    image = PICTURE.resize(size)
    got = fit_picture(Picture(image), *clip)
    assert got.shape == (3, 1, clip[1], clip[0])
    assert torch.equal(got, official_first_frame(image, *clip))


def test_a_crop_is_told_where_it_cuts_more_than_a_tenth() -> None:
    assert crop_notes(Picture(PICTURE.resize((640, 384))), 448, 256) == ()
    (note,) = crop_notes(Picture(PICTURE.resize((600, 800))), 448, 256)
    assert "cut at top and bottom, 57% of it: it is 600x800, the clip 448x256" in note
    assert "--size picture" in note
    assert "at the sides" in crop_notes(Picture(PICTURE.resize((800, 200))), 448, 256)[0]


def test_a_picture_that_changes_during_the_run_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "start.png"
    path.write_bytes(encoded(PICTURE))
    source = source_of(path)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert np.array_equal(pixels(unchanged_picture(path, source)), RGB)
    path.write_bytes(encoded(PICTURE.rotate(180)))
    with pytest.raises(BadRequest, match="was changed while the run was going on"):
        unchanged_picture(path, source)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"no\.png"):
        read_picture(tmp_path / "no.png")
    with pytest.raises(BadRequest, match="counts from the current folder"):
        source_of(Path("no.png"))
    with pytest.raises(BadRequest, match="a folder"):
        read_picture(tmp_path)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ((), {"blocks": "whole"}, "--blocks whole"),
        (("video.frames=1",), {}, "needs frames after it"),
        (("draft.width=32", "draft.height=32"), {}, "two tokens in a frame"),
        ((), {"image_highres": True, "draft_only": True}, "about the high-res stage"),
    ],
)
def test_clips_that_cannot_start_from_a_picture_are_refused(
    tmp_path: Path, changes: tuple[str, ...], options: dict[str, Any], words: str
) -> None:
    path = tmp_path / "start.png"
    path.write_bytes(encoded(PICTURE))
    request = Request(
        prompts=(Prompt(text="a ball", image=path),),
        preset=find_preset("nano", changes),
        out=tmp_path,
        options=RunOptions(**options),
    )
    with pytest.raises(BadRequest, match=words):
        require_usable_sources(request)
