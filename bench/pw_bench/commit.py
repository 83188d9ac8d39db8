# SPDX-License-Identifier: Apache-2.0
"""Which sources a measurement was made with."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """The checked-out commit, marked where files differ from it."""
    try:
        git = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"
