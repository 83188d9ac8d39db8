# SPDX-License-Identifier: Apache-2.0
"""Clips appear in the output folder whole, once, and as they were announced."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pw_runtime.errors import BadRequest, WriteFailed
from pw_runtime.fleet import output_folder
from pw_runtime.fleet.messages import StagedFile
from pw_runtime.fleet.output_folder import STAGING, OutputFolder, StagedFileLost

CONTENT = {"0.json": b"{}", "0.mp4": bytes(range(256)) * 100}


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    (tmp_path / "out").mkdir()
    return OutputFolder(tmp_path / "out")


def staged(name: str, content: bytes) -> StagedFile:
    digest = hashlib.sha256(content).hexdigest()
    return StagedFile(name=name, bytes=len(content), sha256=digest)


FILES = tuple(staged(name, content) for name, content in CONTENT.items())


def write(folder: Path) -> Path:
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    return folder


def piece(name: str, offset: int) -> bytes:
    """A thousand bytes of a file from an offset."""
    return CONTENT[name][offset : offset + 1000]


def test_files_are_moved_in_and_the_last_one_is_the_video(folder: OutputFolder) -> None:
    with folder.opened():
        source = write(folder.staging / "w0")
        video = folder.publish(source, FILES)
        assert video == folder.out / "0.mp4"
        assert list(source.iterdir()) == []
    assert {path.name: path.read_bytes() for path in folder.out.iterdir()} == CONTENT


def test_the_video_appears_after_its_receipt(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    replace = os.replace

    def noted(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        replace(source, target)

    with folder.opened():
        source = write(folder.staging / "w0")
        monkeypatch.setattr(os, "replace", noted)
        folder.publish(source, FILES)
    assert order == ["0.json", "0.mp4"]


def test_pieces_from_a_worker_become_the_same_file(folder: OutputFolder) -> None:
    with folder.opened():
        folder.publish(folder.receive("w0", FILES, piece), FILES)
    assert (folder.out / "0.mp4").read_bytes() == CONTENT["0.mp4"]


def test_a_file_that_arrives_altered_is_not_published(folder: OutputFolder) -> None:
    def altered(name: str, offset: int) -> bytes:
        return piece(name, offset).replace(b"\x07", b"\x08")

    with folder.opened(), pytest.raises(StagedFileLost, match="arrived with SHA-256"):
        folder.receive("w0", FILES, altered)
    assert list(folder.out.iterdir()) == []


def test_a_file_that_ends_early_is_not_published(folder: OutputFolder) -> None:
    def short(name: str, offset: int) -> bytes:
        return piece(name, offset) if offset < 5000 else b""

    with folder.opened(), pytest.raises(StagedFileLost, match="ends at 5000 of 25600 bytes"):
        folder.receive("w0", FILES, short)


def test_a_file_that_never_becomes_visible_publishes_nothing(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folder, "VISIBLE_SECONDS", 0.0)
    with folder.opened():
        source = write(folder.staging / "w0")
        (source / "0.mp4").write_bytes(b"half")
        with pytest.raises(StagedFileLost, match="4 bytes, wanted 25600"):
            folder.publish(source, FILES)
        assert not (folder.out / "0.json").exists()


def test_what_a_killed_driver_left_is_removed_and_so_is_our_own(folder: OutputFolder) -> None:
    left = folder.out / STAGING / "w7" / "1"
    left.mkdir(parents=True)
    (left / "3.mp4").write_bytes(b"half a clip")
    with folder.opened():
        assert not left.exists()
        assert (folder.staging / "token").read_text() == folder.token
    assert not folder.staging.exists()


def test_two_drivers_do_not_share_an_output_folder(folder: OutputFolder) -> None:
    second = OutputFolder(folder.out).opened()
    with folder.opened(), pytest.raises(BadRequest, match="another run is writing"), second:
        pass


def test_a_folder_that_refuses_a_clip_is_one_error(folder: OutputFolder) -> None:
    with folder.opened():
        source = write(folder.staging / "w0")
        (folder.out / "0.mp4").mkdir()
        with pytest.raises(WriteFailed, match="cannot write"):
            folder.publish(source, FILES)


def test_removing_what_is_not_there_is_no_error(folder: OutputFolder) -> None:
    before = sorted(folder.out.iterdir())
    folder.remove("0.latents.safetensors")
    assert sorted(folder.out.iterdir()) == before
