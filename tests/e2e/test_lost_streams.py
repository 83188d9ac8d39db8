# SPDX-License-Identifier: Apache-2.0
"""Standard output and error that are closed, full, or read by nobody: the work is done anyway."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")


def shell(redirected: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `pw` by a shell that redirects its streams; the exit code is that of `pw`."""
    command = shlex.join([sys.executable, "-m", "pw_runtime", *map(str, arguments)])
    return subprocess.run(
        ["bash", "-c", f"{command} {redirected}; exit ${{PIPESTATUS[0]}}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        pytest.param("> /dev/full", 3, marks=FULL),
        pytest.param("2> /dev/full", 0, marks=FULL),
        (">&-", 0),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 0),
        ("| true", 0),
        ("2>&1 | head -n 1", 0),
    ],
)
def test_a_clip_is_finished_without_anyone_to_tell(
    bundle_dir: Path, preset: Path, tmp_path: Path, redirected: str, code: int
) -> None:
    out = tmp_path / "out"
    ended = shell(
        redirected, "generate", "--model", bundle_dir, "--preset", preset, "--draft-only",
        "--prompt", "a cat", "--out", out,
    )  # fmt: skip
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "failed" not in ended.stderr
    assert ("cannot write to the standard output" in ended.stderr) == (code == 3)
    assert sorted(path.name for path in out.iterdir()) == ["0.json", "0.mp4"]


@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        pytest.param("> /dev/full", 3, marks=FULL),
        (">&-", 0),
        ("<&- >&- 2>&-", 0),
        ("| true", 0),
    ],
)
@pytest.mark.parametrize("arguments", [("--help",), ("engines", "list")])
def test_what_is_printed_is_lost_without_a_traceback(
    redirected: str, code: int, arguments: tuple[str, ...]
) -> None:
    ended = shell(redirected, *arguments)
    assert ended.returncode == code, ended.stderr
    assert ("cannot write to the standard output" in ended.stderr) == (code == 3)
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


def test_a_current_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = (
        f"cd {tmp_path}/gone && rmdir ../gone && {sys.executable} -P -m pw_runtime engines list"
    )
    gone = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (gone.returncode, "does not exist any more" in gone.stderr) == (2, True), gone.stderr
