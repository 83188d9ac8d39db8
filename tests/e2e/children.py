# SPDX-License-Identifier: Apache-2.0
"""`pw` in a child process, to be killed or disturbed at a chosen moment."""

from __future__ import annotations

import os
import subprocess
import sys

SETUP = """
import os, signal, sys, time
from pw_runtime import pipeline
from pw_runtime.cli import main as cli
"""


def run_child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `code` after SETUP, with arguments as of `pw`, to its end."""
    return subprocess.run(
        [sys.executable, "-c", SETUP + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
