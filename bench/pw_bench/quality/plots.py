# SPDX-License-Identifier: Apache-2.0
"""Pictures of what was measured: frames of clips beside each other, and bars of the shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

from torch import Tensor

from pw_bench.quality.gate import (
    DRAFT,
    PARTS,
    TRUE,
    Way,
    enlarged,
    highres_of,
    true_video,
    ways_to_paint,
)
from pw_bench.quality.render import Example, Studio
from pw_runtime.job.contact_sheet import (
    Filmstrip,
    SheetRow,
    make_thumb,
    sample_frames,
    write_contact_sheet,
)
from pw_runtime.types import FrameChunk, Preset

THUMBS = 4
USUAL = "4 steps"

# pixels
LABEL, BAR, STEP, GAP, WIDTH = 130, 9, 11, 12, 640
COLOURS = {"colour": "#4269d0", "shape": "#efb118", "motion": "#3ca951"}


def write_sheets(studio: Studio, preset: Preset, shown: Sequence[Example], path: Path) -> None:
    """Two sheets: drafts of captions and their high-res clips; half as many true drafts, beside
    the truth.

    Args:
        studio: the networks.
        preset: sizes and sampler settings.
        shown: captions.
        path: of the first sheet, .png; the second one has "-true" in its name.
    """
    plan, paint = highres_of(preset), ways_to_paint(studio, preset)[USUAL]
    made, true = [], []
    for example in shown:
        low = studio.draft_of(example, preset)
        strips = {"draft": studio.frames(low), "high-res": studio.frames(paint(example, low))}
        made.append(_row(example, strips))
        seen = studio.latent_of(true_video(example.scene, preset.draft, preset))
        strips = {
            "true draft, enlarged": enlarged(studio.frames(seen), plan),
            "high-res of the true draft": studio.frames(paint(example, seen)),
            "true rendering": true_video(example.scene, plan, preset),
        }
        true.append(_row(example, strips))
    write_contact_sheet(made, path)
    write_contact_sheet(true[: len(true) // 2], path.with_stem(f"{path.stem}-true"))


def _row(example: Example, strips: dict[str, Tensor]) -> SheetRow:
    return SheetRow(
        caption=example.text,
        strips=tuple(_strip(name, video) for name, video in strips.items()),
    )


def _strip(name: str, video: Tensor) -> Filmstrip:
    """Of a video [3, F, height, width] in [-1, 1]."""
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous()
    whole = FrameChunk(start=0, pixel_format="rgb24", frames=pixels)
    thumbs = tuple(make_thumb(whole, frame) for frame in sample_frames(len(pixels), THUMBS))
    return Filmstrip(name=name, width=video.shape[3], height=video.shape[2], thumbs=thumbs)


def bars(ways: Sequence[Way]) -> str:
    """SVG of the shares of every way, a group of bars each; stands by itself."""
    top, group = 26, len(PARTS) * STEP + GAP
    height = top + group * len(ways)
    said = f"{', '.join(PARTS)} as the caption says, share of {len(ways[0].seen)} captions"
    picture = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height}",
            "role": "img",
            "aria-label": said,
            "font-family": "sans-serif",
            "font-size": "11",
        },
    )
    _rect(picture, 0, 0, WIDTH, height, "#ffffff")
    for place, part in enumerate(PARTS):
        _rect(picture, LABEL + 90 * place, 8, 9, 9, COLOURS[part])
        _text(picture, LABEL + 90 * place + 14, 16, part)
    for number, way in enumerate(ways):
        y = top + group * number
        _text(picture, LABEL - 8, y + 20, way.name.removesuffix(" renderings"), anchor="end")
        for place, part in enumerate(PARTS):
            share, line = way.adherence[part], y + STEP * place
            _rect(picture, LABEL, line, (WIDTH - LABEL - 50) * share, BAR, COLOURS[part])
            _text(picture, LABEL + (WIDTH - LABEL - 50) * share + 5, line + 9, f"{share:.0%}")
    return tostring(picture, encoding="unicode") + "\n"


def _rect(parent: Element, x: float, y: float, width: float, height: float, colour: str) -> None:
    places = {"x": x, "y": y, "width": width, "height": height}
    SubElement(parent, "rect", {k: f"{v:g}" for k, v in places.items()} | {"fill": colour})


def _text(parent: Element, x: float, y: float, words: str, anchor: str = "start") -> None:
    where = {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor, "fill": "#222222"}
    SubElement(parent, "text", where).text = words


def table(ways: Sequence[Way]) -> str:
    """The same shares and the sharpness as a Markdown table; sharpness in parts of the truth's."""
    true = next(way.sharpness for way in ways if way.name == TRUE)
    lines = [f"| | {' | '.join(PARTS)} | sharpness |", "| --- |" + " --- |" * (len(PARTS) + 1)]
    for way in ways:
        name = f"{DRAFT}, enlarged" if way.name == DRAFT else way.name
        cells = [f"{way.adherence[part]:.0%}" for part in PARTS]
        lines.append(f"| {name} | {' | '.join(cells)} | {way.sharpness / true:.2f} |")
    return "\n".join(lines) + "\n"
