# SPDX-License-Identifier: Apache-2.0
"""Check that the fixed parts of the repository are where the documents say."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

TOP = (
    ".ci/run",
    ".github/workflows/ci.yml",
    ".pre-commit-config.yaml",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "pyproject.toml",
    "requirements/dev.txt",
    "requirements/runtime.txt",
    "bench/pw_bench",
    "docs",
    "engines/pw_engines",
    "export/pw_export",
    "kernels/pw_kernels",
    "pw_runtime/data",
    "pw_runtime/models",
    "pw_runtime/stages",
    "tests",
)
PACKAGES = {
    "pw_runtime": "pw_runtime",
    "pw_kernels": "kernels/pw_kernels",
    "pw_export": "export/pw_export",
    "pw_engines": "engines/pw_engines",
    "pw_bench": "bench/pw_bench",
}
EMPTY_NAMES = {"util", "utils", "misc", "helper", "helpers", "common"}


@pytest.mark.parametrize("name", TOP)
def test_fixed_part_exists(name: str, root: Path) -> None:
    assert (root / name).exists()


@pytest.mark.parametrize("folder", ["kernels", "export", "engines", "bench"])
def test_folder_is_no_package(folder: str, root: Path) -> None:
    """A package called `kernels` would hide the distribution of that name on PyPI."""
    assert not (root / folder / "__init__.py").exists()


@pytest.mark.parametrize("name", PACKAGES)
def test_package_is_imported_by_its_own_name_from_here(name: str, root: Path) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == root / PACKAGES[name]
    assert module.__doc__


def test_no_file_is_named_for_nothing(files: list[Path]) -> None:
    assert [str(f) for f in files if EMPTY_NAMES & {f.stem, *f.parent.parts}] == []


def test_ci_entry_can_be_executed(root: Path) -> None:
    assert (root / ".ci" / "run").stat().st_mode & 0o111
