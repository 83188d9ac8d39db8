# SPDX-License-Identifier: Apache-2.0
"""What a message refers to is a page that `pw docs` prints, also where the package is installed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pw_runtime.cli.docs import pages
from pw_runtime.cli.verbs import cli
from pw_runtime.errors import BadRequest

PACKAGES = ("pw_runtime", "kernels", "engines", "export", "bench")
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
NAMED = re.compile(r"`pw\s+docs\s+([\w/]+)`")
FILE = re.compile(r"\b(?:docs/[\w/]+|README|CONTRIBUTING|CHANGELOG)\.md\b")


def messages(source: str) -> Iterator[str]:
    """Yield every string of a source file that is no docstring."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, DOCUMENTED) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            yield node.value if isinstance(node.value, str) else ""


def commands(command: click.Command, *words: str) -> Iterator[tuple[str, click.Command]]:
    """Yield every command below one, with the words that call it."""
    yield " ".join(words), command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, *words, name)


@pytest.fixture(scope="module")
def texts(root: Path, files: list[Path]) -> dict[str, str]:
    """What users may read: the messages of every source file, and the help of every command."""
    sources = [file for file in files if file.suffix == ".py" and file.parts[0] in PACKAGES]
    result = {
        str(file): "\n".join(messages((root / file).read_text(encoding="utf-8")))
        for file in sources
    }
    for words, command in commands(cli, "pw"):
        result[words] = command.get_help(click.Context(command, info_name=words))
    return result


def test_every_page_that_a_message_names_is_there(texts: dict[str, str]) -> None:
    named = {page: where for where, text in texts.items() for page in NAMED.findall(text)}
    assert {"presets", "numerics", "parallel", "fleet", "json"} <= named.keys()
    assert {page: where for page, where in named.items() if page not in pages()} == {}


def test_no_message_refers_to_a_file_of_the_repository(texts: dict[str, str]) -> None:
    wrong = {where: FILE.findall(text) for where, text in texts.items() if FILE.search(text)}
    assert wrong == {}


def test_docs_lists_and_prints_the_pages(root: Path) -> None:
    listed = CliRunner().invoke(cli, ["docs"]).output.splitlines()
    assert [line.split()[0] for line in listed] == list(pages())
    text = (root / "docs" / "presets.md").read_text(encoding="utf-8")
    for name in ("presets", "docs/presets.md"):
        assert CliRunner().invoke(cli, ["docs", name]).output == text


def test_docs_names_the_nearest_page() -> None:
    with pytest.raises(BadRequest, match="wanted: for instance presets") as error:
        cli.main(["docs", "preset"], standalone_mode=False)
    assert "do this: `pw docs` lists the pages" in str(error.value)
