# SPDX-License-Identifier: Apache-2.0
"""The page's files: nothing from elsewhere, nothing inline, text never read as markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "pw_runtime" / "server" / "page"
FILES = sorted(path for path in PAGE.iterdir() if path.suffix in (".html", ".js", ".css"))


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text in scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self._in in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture(scope="module")
def index() -> Elements:
    return Elements((PAGE / "index.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_has_its_licence_line(file: Path) -> None:
    assert "SPDX-License-Identifier: Apache-2.0" in file.read_text(encoding="utf-8")[:200]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_comes_from_another_host(file: Path) -> None:
    assert re.findall(r"(?:https?:)?//[\w-]+\.\w", file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_text_is_never_read_as_markup_or_code(file: Path) -> None:
    wrong = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc"
    assert re.findall(wrong, file.read_text(encoding="utf-8")) == []


def test_nothing_is_inline(index: Elements) -> None:
    """The content security policy, default-src 'self', would refuse it."""
    assert index.inline == []
    handlers = [(tag, name) for tag, attrs in index.found for name in attrs if name[:2] == "on"]
    assert handlers == []
    assert [tag for tag, attrs in index.found if tag == "style" or "style" in attrs] == []


def test_what_is_linked_is_there(index: Elements) -> None:
    links = [attrs.get(name) for _, attrs in index.found for name in ("src", "href")]
    names = {link for link in links if link and not link.startswith("#")}
    assert names >= {"style.css", "app.js", "theme.js", "icon.svg"}
    assert [name for name in names if not (PAGE / name).is_file()] == []
    imports = {
        name
        for file in FILES
        for name in re.findall(r'from "\./([\w.]+)"', file.read_text(encoding="utf-8"))
    }
    assert {file.name for file in FILES if file.suffix == ".js"} == imports | {"app.js", "theme.js"}


def test_every_id_is_there_once_and_every_reference_resolves(index: Elements) -> None:
    ids = [attrs["id"] for _, attrs in index.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in index.found:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            assert set((attrs.get(name) or "").split()) <= set(ids)
