# SPDX-License-Identifier: Apache-2.0
"""The report's page, as its elements."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from pw_bench.report import write_html
from pw_bench.results import Result

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Elements in order with attributes and their text; fails where one is not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.elements[self.open[-1]][2].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text).strip() for name, _, text in self.elements if name == tag]

    def of_class(self, css_class: str) -> list[str]:
        """Return the text of elements of a class and, for a picture's parts, of their titles."""
        classes = [(attributes.get("class") or "").split() for _, attributes, _ in self.elements]
        indices = [i for i, names in enumerate(classes) if css_class in names]
        is_title = [tag == "title" for tag, _, _ in self.elements]
        texts = ["".join(self.elements[i + is_title[i + 1]][2]) for i in indices]
        return [text.strip() for text in texts]


def page(folder: Path, *results: Result) -> Page:
    write_html(results, folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))
