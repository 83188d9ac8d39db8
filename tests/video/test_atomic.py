# SPDX-License-Identifier: Apache-2.0
"""Files appear complete or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pw_runtime.errors import WriteFailed
from pw_runtime.system.atomic_files import atomic_file, write_failed, write_text


def test_text_is_written_and_leaves_no_partial_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "第一\n")
    assert (tmp_path / "a.json").read_bytes() == "第一\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_any_exception_keeps_the_earlier_file(tmp_path: Path, error: type[BaseException]) -> None:
    final = tmp_path / "a.txt"
    final.write_text("earlier")

    def fail_halfway() -> None:
        with atomic_file(final) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert final.read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_partial_left_by_a_killed_run_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.999999999.partial").write_text("from a killed run, and longer")
    write_text(tmp_path / "a.txt", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "new")]


def test_missing_folder_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed, match="create the folder") as caught:
        write_text(tmp_path / "none" / "a.txt", "x")
    assert str(tmp_path / "none" / "a.txt") in str(caught.value)


def test_folder_that_is_a_file_fails_as_write_failed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteFailed, match="Not a directory"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_final_name_of_a_folder_fails_and_cleans_up(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(WriteFailed, match="a folder"):
        write_text(tmp_path / "a.txt", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_full_disk_names_the_free_space(tmp_path: Path) -> None:
    with (
        pytest.raises(WriteFailed, match=r"No space left on device, [\d.]+ MiB free"),
        atomic_file(tmp_path / "a.bin"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_error_about_another_file_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a.txt"):
        (tmp_path / "weights.safetensors").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_two_processes_that_write_one_path_do_not_meet(tmp_path: Path) -> None:
    """Seen: both wrote one partial file, and the first to finish renamed a half-written clip."""
    other = tmp_path / f".a.txt.{os.getppid()}.partial"
    other.write_text("half of another process's file")
    write_text(tmp_path / "a.txt", "ours")
    assert (tmp_path / "a.txt").read_text() == "ours"
    assert other.read_text() == "half of another process's file"


def test_a_name_the_system_refuses_is_a_write_failure(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed, match="File name too long"):
        write_text(tmp_path / ("x" * 300), "text")


def test_a_full_disk_is_understood_in_the_words_of_safetensors(tmp_path: Path) -> None:
    """Its errors have no errno, so the remedy used to be "run the same command again"."""
    error = RuntimeError("I/O error: No space left on device (os error 28)")
    assert "free some space" in str(write_failed(tmp_path / "a", error))
