# SPDX-License-Identifier: Apache-2.0
"""Text is UTF-8 on every machine: nothing is left to the locale."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PLACES = (
    "pw_runtime/",
    "kernels/",
    "export/",
    "engines/",
    "bench/",
    "requirements/",
    "findings/",
    "docs/",
    "examples/",
)
RUNS = ("run", "Popen", "check_output", "check_call", "call")


def without_encoding(source: str) -> list[int]:
    """Return the lines of calls that read or write text in the encoding of the locale."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and _is_text(node) and not _names_encoding(node)
    ]


def _names_encoding(call: ast.Call) -> bool:
    return any(keyword.arg in ("encoding", None) for keyword in call.keywords)


def _is_text(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    method = isinstance(function, ast.Attribute)
    owner = function.value.id if method and isinstance(function.value, ast.Name) else ""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("read_text", "write_text"):
        return method and owner != "atomic_files" and not (name == "read_text" and call.args)
    if name in RUNS:
        texts = [keywords.get(key) for key in ("text", "universal_newlines")]
        return any(isinstance(text, ast.Constant) and text.value is True for text in texts)
    if name in ("open", "fdopen"):
        if owner in ("av", "os", "Image", "webbrowser", "tarfile", "zipfile") and name == "open":
            return False
        position = 0 if method and name == "open" else 1
        mode = keywords.get("mode", call.args[position] if len(call.args) > position else None)
        if mode is None:
            return not method or not call.args
        return isinstance(mode, ast.Constant) and "b" not in str(mode.value)
    return name in ("NamedTemporaryFile", "TemporaryFile") and not (
        "mode" not in keywords or "b" in ast.dump(keywords["mode"])
    )


def test_every_text_file_names_its_encoding(root: Path, files: list[Path]) -> None:
    wrong = [
        f"{file}:{line}"
        for file in files
        if file.suffix == ".py" and str(file).startswith(PLACES)
        for line in without_encoding((root / file).read_text(encoding="utf-8"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("path.read_text()", True),
        ("path.write_text('x')", True),
        ("path.read_text(encoding='utf-8')", False),
        ("write_text(path, 'x')", False),  # of atomic_files, which is UTF-8
        ("open('x')", True),
        ("open('x', 'w')", True),
        ("open('x', 'rb')", False),
        ("open('x', mode='rb')", False),
        ("path.open()", True),
        ("path.open('w')", True),
        ("path.open('wb')", False),
        ("os.fdopen(1, 'w')", True),
        ("os.open('x', os.O_RDONLY)", False),
        ("av.open('x', 'w')", False),
        ("subprocess.run(['x'], text=True)", True),
        ("subprocess.run(['x'], text=True, encoding='utf-8')", False),
        ("subprocess.run(['x'])", False),
    ],
)
def test_a_call_that_depends_on_the_locale_is_found(call: str, found: bool) -> None:
    assert bool(without_encoding(call)) == found
