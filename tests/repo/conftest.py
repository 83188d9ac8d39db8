# SPDX-License-Identifier: Apache-2.0
"""Where the repository is and what is in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MADE = {"build", "dist", "outputs"}


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's top folder."""
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def files(root: Path) -> list[Path]:
    """Every file that belongs to the repository, relative to its top."""
    found: list[Path] = []
    for folder, names, here in os.walk(root):
        made = MADE if Path(folder) == root else {"__pycache__"}
        names[:] = [n for n in names if n not in made and (n == ".ci" or n[0] != ".")]
        found += [(Path(folder) / name).relative_to(root) for name in here]
    return sorted(found)
