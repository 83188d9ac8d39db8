# SPDX-License-Identifier: Apache-2.0
"""Modules of ours as programs of their own. Imports the standard library alone."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]  # of the sources, or site-packages


def own_program(module: str) -> tuple[str, ...]:
    """Return the command that runs a module of ours and imports none of the current folder's.

    Where the current folder has the project itself, its modules are found there: it may not be
    installed.
    """
    isolated = () if Path(".").resolve() == _ROOT else ("-P",)
    return (sys.executable, *isolated, "-m", module)
