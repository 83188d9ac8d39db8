# SPDX-License-Identifier: Apache-2.0
"""The repository's folder and the files in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MADE = {"build", "dist", "outputs"}
HIDDEN = {".ci", ".github"}


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def files(root: Path) -> list[Path]:
    """Every file that belongs to the repository, relative to its top."""
    result: list[Path] = []
    for folder, names, here in os.walk(root):
        made = MADE if Path(folder) == root else {"__pycache__"}
        names[:] = [n for n in names if n not in made and (n in HIDDEN or n[0] != ".")]
        result += [(Path(folder) / name).relative_to(root) for name in here]
    return sorted(result)
