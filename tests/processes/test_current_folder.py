# SPDX-License-Identifier: Apache-2.0
"""Processes that a run starts import nothing from the folder that the user happens to be in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import pw_runtime
from pw_runtime.cli import launch
from pw_runtime.fleet.group import RANK
from pw_runtime.server.settings import Settings
from pw_runtime.system import rank_processes
from pw_runtime.system.own_program import own_program


def command_of_ranks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the command line of the ranks of `pw --version`."""
    found: list[str] = []

    @contextmanager
    def started(program: Sequence[str], *_: object, **__: object) -> Iterator[list[object]]:
        found.extend(program)
        yield [SimpleNamespace(wait=lambda: 0)]

    monkeypatch.setattr(rank_processes, "rank_processes", started)
    monkeypatch.setattr(sys, "argv", ["pw", "--version"])
    launch.start_ranks(["cpu"])
    return found


@pytest.mark.parametrize("program", ["worker of a server", "rank of a fleet", "rank"])
def test_a_module_of_the_current_folder_is_not_run(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command: Sequence[str] = {
        "worker of a server": Settings(model=tmp_path, root=tmp_path, presets={}).worker,
        "rank of a fleet": own_program(RANK),
        "rank": command_of_ranks(monkeypatch),
    }[program]
    for module in ("queue.py", "click.py"):
        (tmp_path / module).write_text("open('taken', 'w')")
    path = [entry for entry in sys.path if entry]
    subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=program == "rank",  # the others miss their orders
    )
    assert not (tmp_path / "taken").exists()


def test_the_current_folder_counts_where_it_is_the_project(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may not be installed, and be found there alone."""
    monkeypatch.chdir(Path(pw_runtime.__file__).parents[1])
    ended = subprocess.run(
        [*own_program("pw_runtime"), "--version"],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        timeout=120,
    )
    assert "-P" not in own_program("pw_runtime")
    assert ended.returncode == 0, ended.stderr
