# SPDX-License-Identifier: Apache-2.0
"""Which sources a measurement was made with."""

from __future__ import annotations

import subprocess
from pathlib import Path

NO_CHECKOUT = "not a checkout"
_HERE = Path(__file__).parent


def commit() -> str:
    """The checked-out commit, marked where files differ from it; that these sources are of."""
    if not _git("ls-files", "--error-unmatch", Path(__file__).name):
        return NO_CHECKOUT  # installed into the environment of some other checkout, perhaps
    return _git("describe", "--always", "--dirty") or NO_CHECKOUT


def is_dirty() -> bool:
    """Whether tracked files differ from the commit, or it cannot be told."""
    return commit().endswith("-dirty") or commit() == NO_CHECKOUT


def _git(*arguments: str) -> str:
    try:
        command = ("git", "-C", str(_HERE), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
