# SPDX-License-Identifier: Apache-2.0
"""The commit that stands in a result is that of the sources that were measured."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pw_bench.measure import commit

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a commit, and in it a folder that this package was installed into."""
    (tmp_path / "file").write_text("a")
    installed = tmp_path / "site-packages" / "pw_bench"
    installed.mkdir(parents=True)
    (installed / "commit.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "a")
    monkeypatch.setattr(commit, "_HERE", installed)
    return tmp_path


def test_a_checkout_around_an_installation_is_not_its_commit(checkout: Path) -> None:
    assert commit.commit() == commit.NO_CHECKOUT
    assert commit.is_dirty()


def test_of_tracked_sources_it_is_the_commit_and_whether_files_differ(checkout: Path) -> None:
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "b")
    found = commit.commit()
    assert len(found) >= 7
    assert not commit.is_dirty()
    (checkout / "file").write_text("b")
    assert commit.commit() == f"{found}-dirty"
    assert commit.is_dirty()
