# SPDX-License-Identifier: Apache-2.0
"""SVG whose horizontal positions are shares of the width: text and dots keep their size on a
phone. Colours are the style sheet's, by class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup


def share(x: float) -> str:
    """A position or width of the picture, 0 to 1; what lies beyond is at its edge."""
    return f"{100 * min(1.0, max(0.0, x)):.3f}%"


def picture(height: float, says: str) -> Element:
    """An empty picture of full width, `height` pixels high; `says` is what it shows, in words."""
    return Element("svg", {"role": "img", "aria-label": says, "height": f"{height:g}"})


def finished(picture: Element) -> Markup:
    """The picture as it goes into the page, everything escaped."""
    return Markup(tostring(picture, encoding="unicode"))


def _add(parent: Element, tag: str, kind: str, says: str | None, **places: str) -> Element:
    one = SubElement(parent, tag, {"class": kind, **places})
    if says is not None:
        SubElement(one, "title").text = says
    return one


def rect(
    parent: Element,
    kind: str,
    x: tuple[float, float],
    y: tuple[float, float],
    says: str | None = None,
) -> None:
    """A rectangle from x[0] to x[1], shares, and from y[0] to y[1], pixels."""
    width, height = share(max(0.0, x[1] - x[0])), f"{y[1] - y[0]:g}"
    _add(parent, "rect", kind, says, x=share(x[0]), y=f"{y[0]:g}", width=width, height=height)


def line(
    parent: Element,
    kind: str,
    x: tuple[float, float],
    y: tuple[float, float],
    says: str | None = None,
) -> None:
    """A straight line from (x[0], y[0]) to (x[1], y[1])."""
    ends = {"x1": share(x[0]), "x2": share(x[1]), "y1": f"{y[0]:.2f}", "y2": f"{y[1]:.2f}"}
    _add(parent, "line", kind, says, **ends)


def dot(
    parent: Element, kind: str, x: float, y: float, says: str | None = None, radius: float = 2.5
) -> None:
    """A circle."""
    _add(parent, "circle", kind, says, cx=share(x), cy=f"{y:.2f}", r=f"{radius:g}")


def text(
    parent: Element, words: str, x: float, y: float, anchor: str = "middle", aside: float = 0.0
) -> None:
    """Words on a base line; `anchor` is what lies at x: start, middle or end; `aside` in pixels."""
    places = {"x": share(x), "dx": f"{aside:g}", "y": f"{y:g}", "text-anchor": anchor}
    _add(parent, "text", "label", None, **places).text = words


def curve(parent: Element, kind: str, points: Iterable[tuple[float, float]], height: float) -> None:
    """A line through (x, y), shares of the width and of `height` from below."""
    frame = SubElement(
        parent,
        "svg",
        {"viewBox": "0 0 1000 1000", "preserveAspectRatio": "none", "height": f"{height:g}"},
    )
    places = " ".join(f"{1000 * x:.1f},{1000 * (1 - y):.1f}" for x, y in points)
    _add(frame, "polyline", kind, None, points=places)


def axis(marks: Sequence[tuple[float, str]], says: str) -> Markup:
    """Numbers under a plot, each at its place; the outer ones stay inside."""
    one = picture(18, says)
    for x, words in marks:
        line(one, "tick", (x, x), (0, 4))
        anchor = "start" if x < 0.02 else "end" if x > 0.94 else "middle"
        text(one, words, x, 15, anchor)
    return finished(one)
