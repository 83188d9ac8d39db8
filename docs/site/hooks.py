# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: files outside docs/ that pages link to become part of the site, and the
reference of the command line is filled in."""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

sys.path.insert(0, os.fspath(Path(__file__).parent))
from command_line import reference

ROOT = Path(__file__).parents[2]
COMMANDS = "<!-- every command -->"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
LANGUAGES = {".sh": "bash", ".py": "python", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages at the top, and every file outside docs/ that any page links to."""
    todo = [file.name for file in ROOT.glob("*.md")]
    todo += [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    done = set(todo)
    while todo:
        source = todo.pop()
        if _in_site(source) == source:
            files.append(_added(source, config))
        if source.endswith(".md"):
            found = {_target(source, link) for link in _links(source)} - done
            linked = {path for path in found if _in_site(path) == path and (ROOT / path).is_file()}
            todo += sorted(linked)
            done |= linked
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links of the repository's tree lead to the places of the site; fill in the commands."""
    uri = page.file.src_uri
    source = uri if page.file.generated_by else f"docs/{uri}"
    here = posixpath.dirname(uri) or "."

    def placed(match: re.Match[str]) -> str:
        target = _target(source, match[1])
        if not (ROOT / target).is_file():  # code that looks like a link, or a dead one
            return match[0]
        return posixpath.relpath(_shown(_in_site(target)), here)

    return LINK.sub(placed, markdown).replace(COMMANDS, reference())


def _links(source: str) -> list[str]:
    return LINK.findall((ROOT / source).read_text(encoding="utf-8"))


def _target(source: str, link: str) -> str:
    """Return the path in the repository that a link of one of its pages leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _in_site(path: str) -> str:
    """Return the place in the site of a path in the repository: docs/ is the site's top."""
    return path.removeprefix("docs/")


def _shown(path: str) -> str:
    """Return the name of the page that shows a file: programs are shown, not downloaded."""
    return f"{path}.md" if Path(path).suffix in LANGUAGES else path


def _added(path: str, config: MkDocsConfig) -> File:
    source, level = ROOT / path, InclusionLevel.NOT_IN_NAV  # but where the nav has it
    language = LANGUAGES.get(source.suffix)
    if language is None:
        return File.generated(config, path, abs_src_path=os.fspath(source), inclusion=level)
    text = source.read_text(encoding="utf-8")
    page = f"# {source.name}\n\n````{language}\n{text}````\n"
    return File.generated(config, _shown(path), content=page, inclusion=level)
