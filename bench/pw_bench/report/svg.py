# SPDX-License-Identifier: Apache-2.0
"""SVG whose horizontal positions are shares of the width, so that text and dots keep their size
on a phone. Colours come from the style sheet, by class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup


def share(x: float) -> str:
    """Format a position or width, 0 to 1, as a share of the width; clamp it to the picture."""
    return f"{100 * min(1.0, max(0.0, x)):.3f}%"


def picture(height: float, description: str) -> Element:
    """Return an empty picture of full width, `height` pixels high, described in words."""
    return Element("svg", {"role": "img", "aria-label": description, "height": f"{height:g}"})


def finished(picture: Element) -> Markup:
    """Return the picture as it goes into the page, everything escaped."""
    return Markup(tostring(picture, encoding="unicode"))


def _add(
    parent: Element, tag: str, css_class: str, title: str | None, **attributes: str
) -> Element:
    element = SubElement(parent, tag, {"class": css_class, **attributes})
    if title is not None:
        SubElement(element, "title").text = title
    return element


def rect(
    parent: Element,
    css_class: str,
    x: tuple[float, float],
    y: tuple[float, float],
    title: str | None = None,
) -> None:
    """Draw a rectangle from x[0] to x[1], shares, and from y[0] to y[1], pixels."""
    width, height = share(max(0.0, x[1] - x[0])), f"{y[1] - y[0]:g}"
    left, top = share(x[0]), f"{y[0]:g}"
    _add(parent, "rect", css_class, title, x=left, y=top, width=width, height=height)


def line(
    parent: Element,
    css_class: str,
    x: tuple[float, float],
    y: tuple[float, float],
    title: str | None = None,
) -> None:
    """Draw a straight line from (x[0], y[0]) to (x[1], y[1])."""
    ends = {"x1": share(x[0]), "x2": share(x[1]), "y1": f"{y[0]:.2f}", "y2": f"{y[1]:.2f}"}
    _add(parent, "line", css_class, title, **ends)


def dot(
    parent: Element,
    css_class: str,
    x: float,
    y: float,
    title: str | None = None,
    radius: float = 2.5,
) -> None:
    """Draw a circle."""
    _add(parent, "circle", css_class, title, cx=share(x), cy=f"{y:.2f}", r=f"{radius:g}")


def text(
    parent: Element, words: str, x: float, y: float, anchor: str = "middle", shift: float = 0.0
) -> None:
    """Write words on a base line.

    Args:
        parent: picture.
        words: what to write.
        x: share of the width.
        y: pixels.
        anchor: point of the words that lies at x: start, middle or end.
        shift: to the right, in pixels.
    """
    attributes = {"x": share(x), "dx": f"{shift:g}", "y": f"{y:g}", "text-anchor": anchor}
    _add(parent, "text", "label", None, **attributes).text = words


def curve(
    parent: Element, css_class: str, points: Iterable[tuple[float, float]], height: float
) -> None:
    """Draw a line through (x, y), shares of the width and of `height` from below."""
    frame = SubElement(
        parent,
        "svg",
        {"viewBox": "0 0 1000 1000", "preserveAspectRatio": "none", "height": f"{height:g}"},
    )
    coordinates = " ".join(f"{1000 * x:.1f},{1000 * (1 - y):.1f}" for x, y in points)
    _add(frame, "polyline", css_class, None, points=coordinates)


def axis(marks: Sequence[tuple[float, str]], description: str) -> Markup:
    """Return the numbers under a plot, at their positions; the outer ones stay inside."""
    plot = picture(18, description)
    for x, words in marks:
        line(plot, "tick", (x, x), (0, 4))
        anchor = "start" if x < 0.02 else "end" if x > 0.94 else "middle"
        text(plot, words, x, 15, anchor)
    return finished(plot)
