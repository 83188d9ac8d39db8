# SPDX-License-Identifier: Apache-2.0
"""Pictures of the measurements: frames of clips side by side, and bars of the shares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

from torch import Tensor

from pw_bench.quality.gate import USUAL, enlarge, highres_of, highres_variants, true_video
from pw_bench.quality.measure import ATTRIBUTES
from pw_bench.quality.render import Example, Renderer
from pw_bench.result_sections import Variant
from pw_runtime.job.contact_sheet import (
    Filmstrip,
    SheetRow,
    make_thumb,
    sample_frames,
    write_contact_sheet,
)
from pw_runtime.types import FrameChunk, Preset

THUMBNAILS = 4

# pixels
LABEL, BAR, STEP, GAP, WIDTH = 130, 9, 11, 12, 640
COLOURS = {"colour": "#4269d0", "shape": "#efb118", "motion": "#3ca951"}


def write_sheets(
    renderer: Renderer, preset: Preset, held_out: Sequence[Example], path: Path
) -> None:
    """Write two sheets: drafts and high-res clips of captions; true drafts beside the truth.

    Args:
        renderer: the networks.
        preset: sizes and sampler settings.
        held_out: captions; the second sheet has the first half of them.
        path: of the first sheet, .png; the second one has "-true" in its name.
    """
    config, highres = highres_of(preset), highres_variants(renderer, preset)[USUAL]
    generated, true = [], []
    for example in held_out:
        low = renderer.draft_latent(example, preset)
        high = renderer.decode(highres(example, low))
        generated.append(_row(example, {"draft": renderer.decode(low), "high-res": high}))
        low = renderer.encode(true_video(example.scene, preset.draft, preset))
        strips = {
            "true draft, enlarged": enlarge(renderer.decode(low), config),
            "high-res of the true draft": renderer.decode(highres(example, low)),
            "true rendering": true_video(example.scene, config, preset),
        }
        true.append(_row(example, strips))
    write_contact_sheet(generated, path)
    write_contact_sheet(true[: (len(true) + 1) // 2], path.with_stem(f"{path.stem}-true"))


def _row(example: Example, strips: dict[str, Tensor]) -> SheetRow:
    return SheetRow(
        caption=example.text,
        strips=tuple(_strip(name, video) for name, video in strips.items()),
    )


def _strip(name: str, video: Tensor) -> Filmstrip:
    """Return thumbnails of a video [3, F, height, width] in [-1, 1]."""
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous()
    chunk = FrameChunk(start=0, pixel_format="rgb24", frames=pixels)
    frames = sample_frames(len(pixels), THUMBNAILS)
    thumbnails = tuple(make_thumb(chunk, frame) for frame in frames)
    return Filmstrip(name=name, width=video.shape[3], height=video.shape[2], thumbs=thumbnails)


def bars(variants: Sequence[Variant]) -> str:
    """Return an SVG of the shares of every variant, a group of bars each; a file of its own."""
    top, group = 26, len(ATTRIBUTES) * STEP + GAP
    height = top + group * len(variants)
    names, count = ", ".join(ATTRIBUTES), len(variants[0].seen)
    picture = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height}",
            "role": "img",
            "aria-label": f"{names} as the caption says, share of {count} captions",
            "font-family": "sans-serif",
            "font-size": "11",
        },
    )
    _rect(picture, 0, 0, WIDTH, height, "#ffffff")
    for i, attribute in enumerate(ATTRIBUTES):
        _rect(picture, LABEL + 90 * i, 8, 9, 9, COLOURS[attribute])
        _text(picture, LABEL + 90 * i + 14, 16, attribute)
    for number, variant in enumerate(variants):
        y = top + group * number
        name = variant.name.removesuffix(" renderings")
        _text(picture, LABEL - 8, y + 20, name, anchor="end")
        for i, attribute in enumerate(ATTRIBUTES):
            share, line = variant.adherence[attribute], y + STEP * i
            width = (WIDTH - LABEL - 50) * share
            _rect(picture, LABEL, line, width, BAR, COLOURS[attribute])
            _text(picture, LABEL + width + 5, line + 9, f"{share:.0%}")
    return tostring(picture, encoding="unicode") + "\n"


def _rect(parent: Element, x: float, y: float, width: float, height: float, colour: str) -> None:
    attributes = {"x": x, "y": y, "width": width, "height": height}
    text = {name: f"{value:g}" for name, value in attributes.items()}
    SubElement(parent, "rect", text | {"fill": colour})


def _text(parent: Element, x: float, y: float, words: str, anchor: str = "start") -> None:
    attributes = {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor, "fill": "#222222"}
    SubElement(parent, "text", attributes).text = words
