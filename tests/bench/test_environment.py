# SPDX-License-Identifier: Apache-2.0
"""The commit in a result is that of the measured sources."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pw_bench.measure import environment

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


def test_implementations_are_recorded_once_they_are_known() -> None:
    """Seen: "reference" in every file, whatever the clips had run on."""
    assert environment.identify(CPU).operations == {}
    found = environment.identify(CPU, operations=environment.usual_operations(CPU)).operations
    assert found["attention"] == "reference"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a checkout with a commit, around a folder that this package is installed into."""
    (tmp_path / "file").write_text("a")
    installed = tmp_path / "site-packages" / "pw_bench"
    installed.mkdir(parents=True)
    (installed / "environment.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "a")
    monkeypatch.setattr(environment, "_HERE", installed)
    return tmp_path


def test_checkout_around_an_installation_is_not_its_commit(checkout: Path) -> None:
    assert environment.commit() == environment.NO_CHECKOUT
    assert environment.is_dirty()


def test_tracked_sources_have_a_commit_and_are_dirty_once_files_differ(checkout: Path) -> None:
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "b")
    commit = environment.commit()
    assert len(commit) >= 7
    assert not environment.is_dirty()
    (checkout / "file").write_text("b")
    assert environment.commit() == f"{commit}-dirty"
    assert environment.is_dirty()


def test_sources_copied_away_from_their_history_have_the_stated_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PW_COMMIT", "0123abc")
    assert environment.commit() == "0123abc"
    assert not environment.is_dirty()
