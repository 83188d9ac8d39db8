# SPDX-License-Identifier: Apache-2.0
"""The contact sheet: right frames, right places, and captions in any language."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from pw_runtime.job import contact_sheet
from pw_runtime.job.contact_sheet import (
    Filmstrip,
    SheetRow,
    Thumb,
    make_thumb,
    sample_frames,
    watch_frames,
    write_contact_sheet,
)
from pw_runtime.types import FrameChunk


def row(caption: str, count: int) -> SheetRow:
    """Grey frames whose level is 10 times their number; the high-res ones 5 lighter."""
    strips = []
    for name, lighter, (width, height) in (
        ("draft", 0, (448, 256)),
        ("high-res", 5, (896, 512)),
    ):
        levels = torch.arange(1, count + 1, dtype=torch.uint8).view(-1, 1, 1, 1) * 10 + lighter
        frames = levels.repeat(1, height, width, 3)
        chunk = FrameChunk(start=1, pixel_format="rgb24", frames=frames)
        thumbs = tuple(make_thumb(chunk, i) for i in range(1, count + 1))
        strips.append(Filmstrip(name=name, width=width, height=height, thumbs=thumbs))
    return SheetRow(caption=caption, strips=tuple(strips))


def picture(path: Path, rows: list[SheetRow]) -> Image.Image:
    write_contact_sheet(rows, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.convert("RGB")


@pytest.mark.parametrize(
    ("total", "count", "frames"),
    [
        (33, 5, [0, 8, 16, 24, 32]),
        (121, 2, [0, 120]),
        (9, 1, [4]),
        (3, 6, [0, 1, 2]),
        (1, 1, [0]),
        (1, 4, [0]),
    ],
)
def test_samples_are_even_and_reach_both_ends(total: int, count: int, frames: list[int]) -> None:
    assert sample_frames(total, count) == frames


@pytest.mark.parametrize(("total", "count"), [(0, 3), (3, 0)])
def test_sampling_nothing_is_refused(total: int, count: int) -> None:
    with pytest.raises(ValueError, match="cannot take"):
        sample_frames(total, count)


def test_thumb_keeps_proportions_and_colour() -> None:
    frames = torch.tensor([200, 30, 90], dtype=torch.uint8).repeat(2, 720, 1280, 1)
    thumb = make_thumb(FrameChunk(start=6, pixel_format="rgb24", frames=frames), 7)
    assert thumb.frame == 7
    assert thumb.image.size == (240, 135)
    assert thumb.image.getpixel((120, 60)) == (200, 30, 90)


def test_thumb_of_planes_has_the_colour_of_bt709() -> None:
    planes = torch.full((1, 720 * 3 // 2, 1280), 173, dtype=torch.uint8)  # green
    planes[0, 720:900], planes[0, 900:] = 42, 26
    thumb = make_thumb(FrameChunk(start=0, pixel_format="yuv420p", frames=planes), 0)
    assert thumb.image.size == (240, 135)
    assert thumb.image.getpixel((120, 60)) == pytest.approx((0, 255, 0), abs=3)


def test_watching_passes_chunks_on_and_keeps_only_small_pictures() -> None:
    alive: list[bool] = []

    def made() -> Iterator[FrameChunk]:
        for start in (0, 3, 6):
            level = torch.arange(start, start + 3, dtype=torch.uint8).view(3, 1, 1, 1)
            chunk = FrameChunk(
                start=start, pixel_format="rgb24", frames=level.repeat(1, 512, 896, 3)
            )
            seen = weakref.ref(chunk.frames)
            yield chunk
            del chunk
            alive.append(seen() is not None)

    thumbs: list[Thumb] = []
    starts = []
    for chunk in watch_frames(made(), {0, 4, 8}, thumbs):
        starts.append(chunk.start)
        del chunk
    assert starts == [0, 3, 6]
    assert alive == [False, False, False]
    assert [thumb.frame for thumb in thumbs] == [0, 4, 8]
    assert [thumb.image.getpixel((9, 9)) for thumb in thumbs] == [(0,) * 3, (4,) * 3, (8,) * 3]


@pytest.mark.parametrize("count", [1, 2, 6])
def test_thumbs_stand_in_order_draft_above_high_res(count: int, tmp_path: Path) -> None:
    image = picture(tmp_path / "sheet.png", [row("a cat", count), row("a dog", count)])
    assert image.width == max(2, count) * 248 - 8 + 2 * 28
    for i in range(count):
        column = [image.getpixel((28 + 248 * i + 120, y)) for y in range(image.height)]
        greys = {10 * (i + 1), 10 * (i + 1) + 5}
        bands = [p[0] for p in column if isinstance(p, tuple) and len(set(p)) == 1]
        seen = [
            level
            for level, before in zip(bands, [-1, *bands], strict=False)
            if level in greys and level != before
        ]
        assert seen == [10 * (i + 1), 10 * (i + 1) + 5] * 2


def test_long_caption_is_cut_to_two_lines(tmp_path: Path) -> None:
    two_lines = picture(tmp_path / "a.png", [row("a red fox in the snow " * 6, 2)])
    endless = picture(tmp_path / "b.png", [row("a red fox in the snow " * 400, 2)])
    no_spaces = picture(tmp_path / "c.png", [row("fox" * 2000, 2)])
    one_line = picture(tmp_path / "d.png", [row("a red fox", 2)])
    assert two_lines.size == endless.size == no_spaces.size
    assert one_line.height < two_lines.height


def test_caption_without_a_font_is_described_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's font has no Chinese; empty boxes would pass for a caption."""
    monkeypatch.setattr(contact_sheet, "OTHER_FONTS", ())
    said = picture(tmp_path / "a.png", [row("1 [3 characters this font lacks] cafe - x", 2)])
    drawn = picture(tmp_path / "b.png", [row("1 一只猫 café — ×", 2)])
    assert drawn.tobytes() == said.tobytes()


def test_empty_sheet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        write_contact_sheet([], tmp_path / "sheet.png")
