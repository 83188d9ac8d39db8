# SPDX-License-Identifier: Apache-2.0
"""Builds that are killed, and builders at the same time: real processes, step by step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pw_engines.store import EngineStore
from tests.engines.small import key, put

BUILDER = Path(__file__).with_name("builder.py")


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


class Builder:
    """builder.py at work."""

    def __init__(self, root: Path, how: str) -> None:
        paths = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, BUILDER, root, how],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def reached(self) -> str:
        """Wait for what it has come to."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(store: EngineStore) -> Iterator[Callable[[str], Builder]]:
    started: list[Builder] = []

    def make(how: str) -> Builder:
        started.append(Builder(store.root, how))
        return started[-1]

    yield make
    for process in started:
        process.end()


def test_a_killed_build_leaves_nothing_to_find_and_no_lock(
    store: EngineStore, start: Callable[[str], Builder]
) -> None:
    builder = start("wait")
    assert builder.reached() == "locked"
    builder.go_on()
    assert builder.reached() == "half"
    with store.locked(key(), wait=False) as mine:
        assert not mine
    assert store.remove_leftovers() == []  # it is being built
    builder.end()
    assert store.find(key()).state == "missing"
    assert store.entries(verify=True) == []
    (left,) = store.remove_leftovers()
    assert not left.exists()
    assert left.name.startswith(".building-")
    with store.locked(key(), wait=False) as mine:
        assert mine
    put(store)
    assert store.find(key()).state == "fresh"


def test_of_two_builders_one_builds(store: EngineStore, start: Callable[[str], Builder]) -> None:
    first = start("wait")
    assert first.reached() == "locked"
    hasty, patient = start("try"), start("wait")
    assert hasty.reached() == "taken"
    first.go_on()
    assert first.reached() == "half"
    first.go_on()
    assert first.reached() == "published"
    assert patient.reached() == "fresh"
    lookup = store.find(key())
    assert lookup.path is not None
    assert lookup.path.read_bytes() == b"whole engine"
