# SPDX-License-Identifier: Apache-2.0
"""`from pw_runtime import X`: every public name has its type, and exists; no other name has one."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import pw_runtime

HEAVY = {"torch", "numpy", "pydantic", "rich", "av", "PIL", "safetensors", "click"}


@pytest.fixture(scope="module")
def source(root: Path) -> ast.Module:
    return ast.parse((root / "pw_runtime" / "__init__.py").read_text(encoding="utf-8"))


def type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_a_type_checker_sees_every_public_name_where_it_is_defined(source: ast.Module) -> None:
    (block,) = (node for node in source.body if type_checking(node))
    assert isinstance(block, ast.If)
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == pw_runtime._HOME
    assert set(pw_runtime.__all__) == {*typed, "__version__"}


def test_a_type_checker_does_not_take_any_other_name_for_an_object(source: ast.Module) -> None:
    seen = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    assert "__getattr__" not in seen


def test_every_public_name_exists_and_is_listed() -> None:
    assert set(pw_runtime.__all__) <= set(dir(pw_runtime))
    for name in pw_runtime.__all__:
        assert getattr(pw_runtime, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pw_runtime.nonsense  # noqa: B018
    assert pw_runtime.__version__ == metadata.version("pixelwizard-runtime")


def test_importing_the_package_imports_nothing_heavy(root: Path) -> None:
    code = f"import sys, pw_runtime; dir(pw_runtime); print({HEAVY} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"
