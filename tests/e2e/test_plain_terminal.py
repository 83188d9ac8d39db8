# SPDX-License-Identifier: Apache-2.0
"""A terminal that knows ASCII alone: nothing ends in a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def pw(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-m", "pw_runtime", *map(str, arguments)],
        env={**os.environ, **ASCII, **paths},
        capture_output=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("doctor",), 0),
        (("compare", "bäd.txt", "bäd.txt"), 2),
        (("plan", "--preset", "größe.toml"), 2),
        (("generate", "--preset", "nano", "--out", "öut", "--prompt", "café"), 2),
        (("bench", "compare", "é.json", "é.json"), 2),
        (("bench", "report", "é.json", "--out", "ü.html"), 2),
    ],
)
def test_names_that_are_not_ascii_are_escaped(
    tmp_path: Path, arguments: tuple[str, ...], code: int
) -> None:
    (tmp_path / "bäd.txt").write_text("ä", encoding="utf-8")
    named = (tmp_path / word if "." in word else word for word in arguments)
    ended = pw(*named)
    assert ended.returncode == code, ended.stderr
    assert b"Traceback" not in ended.stderr
    ended.stderr.decode("ascii")
    ended.stdout.decode("ascii")
