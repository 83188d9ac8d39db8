# SPDX-License-Identifier: Apache-2.0
"""One picture of many clips: per prompt, frames of the draft above the same frames finished."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont

from pw_runtime.system.atomic_files import atomic_file
from pw_runtime.types import FrameChunk, PixelFormat

SHEET: Final = "contact_sheet.png"
# pixels
THUMB_WIDTH: Final = 240
GAP: Final = 8  # between thumbs
STRIP_GAP: Final = 14  # between strips
MARGIN: Final = 28  # around the sheet and between rows
MIN_WIDTH: Final = 2 * THUMB_WIDTH + GAP  # a caption needs that much
CAPTION_SIZE: Final = 17
LABEL_SIZE: Final = 13
CAPTION_LINES: Final = 2

BACKGROUND: Final = (20, 21, 25)
RULE: Final = (52, 54, 61)
CAPTION: Final = (238, 238, 240)
LABEL: Final = (150, 153, 162)

# Pillow's own font draws little more than ASCII. Dashes are made plain; a prompt that needs more
# still is set in the one of these that the system has and that draws most of it.
PLAIN: Final = str.maketrans("‐‑‒–—―−×", "-------x")
OTHER_FONTS: Final = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumb:
    """A small picture of one frame."""

    frame: int  # index in the clip
    image: Image.Image  # RGB, THUMB_WIDTH wide


@dataclass(frozen=True, slots=True, kw_only=True)
class Filmstrip:
    """Thumbs of one clip, left to right; width and height are the clip's, in pixels."""

    name: str
    width: int
    height: int
    thumbs: tuple[Thumb, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SheetRow:
    """One prompt and its strips, top to bottom (draft, then high-res)."""

    caption: str
    strips: tuple[Filmstrip, ...]


def sample_frames(total: int, count: int) -> list[int]:
    """Return up to `count` evenly spaced indices below `total`, first and last included; the
    middle one if `count` is 1."""
    if total < 1 or count < 1:
        raise ValueError(f"cannot take {count} of {total} frames")
    if count == 1:
        return [total // 2]
    if count >= total:
        return list(range(total))
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def make_thumb(chunk: FrameChunk, frame: int) -> Thumb:
    """Shrink one frame of a chunk, by its index in the clip, keeping its proportions."""
    pixels: np.ndarray = chunk.frames[frame - chunk.start].numpy()
    if chunk.pixel_format != "rgb24":
        pixels = _rgb(pixels, chunk.pixel_format)
    height, width, _ = pixels.shape
    size = (THUMB_WIDTH, max(1, round(THUMB_WIDTH * height / width)))
    picture = Image.fromarray(pixels)
    return Thumb(frame=frame, image=picture.resize(size, Image.Resampling.LANCZOS))


def _rgb(planes: np.ndarray, pixel_format: PixelFormat) -> np.ndarray:
    """BT.709 in limited range -> [height, width, 3] RGB."""
    frame = av.VideoFrame.from_ndarray(planes, format=pixel_format)
    return frame.reformat(
        format="rgb24",
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
    ).to_ndarray()


def watch_frames(
    chunks: Iterable[FrameChunk], wanted: Collection[int], thumbs: list[Thumb]
) -> Iterator[FrameChunk]:
    """Pass `chunks` on unchanged and append a thumb of every wanted frame to `thumbs`."""
    for chunk in chunks:
        for frame in range(chunk.start, chunk.start + len(chunk.frames)):
            if frame in wanted:
                thumbs.append(make_thumb(chunk, frame))
        yield chunk
        del chunk  # while the next chunk is made, this one must be free


def write_contact_sheet(rows: Sequence[SheetRow], path: Path) -> None:
    """Draw `rows` one below the other into a PNG. Raises WriteFailed."""
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    widths = [_filmstrip_width(strip) for row in rows for strip in row.strips]
    width = max(MIN_WIDTH, *widths)
    blocks = [_draw_row(row, width) for row in rows]
    height = sum(block.height for block in blocks) + MARGIN * (2 * len(blocks))
    sheet = Image.new("RGB", (width + 2 * MARGIN, height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for i, block in enumerate(blocks):
        if i:
            pen.line([(MARGIN, top - MARGIN), (MARGIN + width, top - MARGIN)], fill=RULE)
        sheet.paste(block, (MARGIN, top))
        top += block.height + 2 * MARGIN
    with atomic_file(path) as partial:
        sheet.save(partial, format="PNG")


def _filmstrip_width(strip: Filmstrip) -> int:
    return len(strip.thumbs) * (THUMB_WIDTH + GAP) - GAP


def _draw_row(row: SheetRow, width: int) -> Image.Image:
    caption_font, caption = _legible(" ".join(row.caption.split()), CAPTION_SIZE)
    lines = _wrap(caption, caption_font, width, CAPTION_LINES)
    label_font = _plain_font(LABEL_SIZE)
    caption_step, label_step = CAPTION_SIZE + 7, LABEL_SIZE + 7
    strip_steps = [
        2 * label_step + max(thumb.image.height for thumb in strip.thumbs) + STRIP_GAP
        for strip in row.strips
    ]
    height = len(lines) * caption_step + 4 + sum(strip_steps)
    block = Image.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(block)
    top = 0
    for line in lines:
        pen.text((0, top), line, font=caption_font, fill=CAPTION)
        top += caption_step
    top += 4
    for strip, step in zip(row.strips, strip_steps, strict=True):
        label = f"{strip.name}   {strip.width} x {strip.height}"
        pen.text((0, top + 5), label, font=label_font, fill=LABEL)
        for i, thumb in enumerate(strip.thumbs):
            left, below = i * (THUMB_WIDTH + GAP), top + label_step + 5
            block.paste(thumb.image, (left, below))
            number = (left, below + thumb.image.height + 4)
            pen.text(number, f"frame {thumb.frame}", font=label_font, fill=LABEL)
        top += step
    return block


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Cut `text` into at most `lines` pieces no wider than `width` pixels, the last one elided."""
    pieces: list[str] = []
    rest = text
    while font.getlength(rest) > width and len(pieces) < lines - 1:
        end = _max_prefix(rest, font, width)
        space = rest.rfind(" ", 0, end + 1)
        end = space if space > 0 else end  # Chinese has no spaces: cut anywhere
        pieces.append(rest[:end])
        rest = rest[end:].lstrip()
    if font.getlength(rest) > width:
        rest = rest[: _max_prefix(rest, font, width - font.getlength("…"))].rstrip() + "…"
    return [*pieces, rest]


def _max_prefix(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """Return how many leading characters of `text` fit into `width` pixels, at least one."""
    fits = bisect_right(range(len(text) + 1), width, key=lambda n: font.getlength(text[:n])) - 1
    return max(1, fits)


def _plain_font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _legible(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """Return the font that draws most of `text`, and `text` with what it cannot draw said in
    words, so that no row of empty boxes passes for a prompt."""
    text = unicodedata.normalize("NFC", text).translate(PLAIN)
    font = _plain_font(size)
    missing = _missing(text, font)
    if missing:
        for name in OTHER_FONTS:
            with suppress(OSError):  # the system does not have it
                other = ImageFont.truetype(name, size)
                other_missing = _missing(text, other)
                if len(other_missing) < len(missing):
                    font, missing = other, other_missing
    pieces = []
    for lost, run in groupby(text, key=missing.__contains__):
        piece = "".join(run)
        pieces.append(_in_other_words(piece, font) if lost else piece)
    return font, "".join(pieces)


def _missing(text: str, font: ImageFont.FreeTypeFont) -> set[str]:
    """Return the characters for which `font` would draw its empty box."""
    box = font.getmask("\U0010ffff")
    empty = (box.size, bytes(box))
    masks = {character: font.getmask(character) for character in set(text) - {" "}}
    return {c for c, mask in masks.items() if (mask.size, bytes(mask)) == empty}


def _in_other_words(run: str, font: ImageFont.FreeTypeFont) -> str:
    """Spell a run that `font` cannot draw in its plain letters, or count it."""
    plain = "".join(
        c for c in unicodedata.normalize("NFKD", run) if unicodedata.category(c) not in ("Mn", "Cf")
    )
    if not _missing(plain, font):
        return plain
    return f"[{len(run)} character{'s' if len(run) > 1 else ''} this font lacks]"
