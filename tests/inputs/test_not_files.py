# SPDX-License-Identifier: Apache-2.0
"""What is no regular file is neither waited for nor replaced."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pw_bench.clips.compare import find_pairs
from pw_bench.results import read_result
from pw_runtime.checkpoint.bundle import check_tensors, open_bundle, verify
from pw_runtime.errors import BadRequest, PixelWizardError, WriteFailed
from pw_runtime.job.checks import pick_device
from pw_runtime.job.drafts import read_drafts
from pw_runtime.job.latents import read_provenance
from pw_runtime.job.receipt import read_receipt
from pw_runtime.job.sources import source_of
from pw_runtime.job.verify import find_clips
from pw_runtime.presets import read_preset
from pw_runtime.prompts import read_prompts
from pw_runtime.sampling.noise import load_noise
from pw_runtime.system.atomic_files import (
    atomic_file,
    require_replaceable,
    write_tensors,
    write_text,
)
from pw_runtime.system.folder_lock import NAME, locked_folder
from pw_runtime.system.video_input import count_frames
from tests.inputs.small_files import PRESET

Make = Callable[[Path], None]


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(path.parent, os.O_RDONLY)
        here = os.getcwd()
        os.chdir(folder)  # the name of a socket may not be longer than 107 bytes
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)
            os.close(folder)


def link_to(target: str) -> Make:
    return lambda path: path.symlink_to(target)


NO_FILES: dict[str, Make] = {
    "a named pipe": os.mkfifo,
    "a socket": a_socket,
    "a folder": lambda path: path.mkdir(),
    "a device": link_to("/dev/full"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "prompts": read_prompts,
    "preset": read_preset,
    "latents": read_provenance,
    "noise": lambda path: load_noise(path, PRESET.stages(), PRESET.video),
    "results": read_result,
    "receipt": read_receipt,
    "picture or video": source_of,
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_for_what_is_no_file(tmp_path: Path, kind: str, reader: str) -> None:
    NO_FILES[kind](tmp_path / "x")
    with pytest.raises(BadRequest, match=f"got: {kind}"):
        READERS[reader](tmp_path / "x")


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device"])
def test_a_clip_to_compare_is_a_file(tmp_path: Path, kind: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        NO_FILES[kind](tmp_path / name / "0.mp4")
    with pytest.raises(BadRequest, match=f"is not a clip\n  got: {kind}"):
        find_pairs(tmp_path / "a" / "0.mp4", tmp_path / "b" / "0.mp4")
    with pytest.raises(BadRequest, match="no clips in"):
        find_pairs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_bundle_of_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    NO_FILES[kind](tmp_path / "bundle.json")
    with pytest.raises(PixelWizardError, match=kind):
        open_bundle(tmp_path)


def test_a_shard_that_is_a_pipe_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "bundle.json").write_bytes((bundle_dir / "bundle.json").read_bytes())
    for name in open_bundle(bundle_dir).networks.vae.files:
        os.mkfifo(tmp_path / name)
    with pytest.raises(PixelWizardError, match="a named pipe, not a file"):
        check_tensors(open_bundle(tmp_path), "vae")
    with pytest.raises(PixelWizardError, match="a named pipe, not a file"):
        verify(open_bundle(tmp_path), open_bundle(tmp_path).networks.vae.files)


@pytest.mark.parametrize("through_link", [False, True])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_never_replaced(tmp_path: Path, kind: str, through_link: bool) -> None:
    place = path = tmp_path / "x"
    NO_FILES[kind](place)
    if through_link:
        path = tmp_path / "link"
        path.symlink_to("x")
    before = os.lstat(place)
    with pytest.raises(WriteFailed, match=kind):
        write_text(path, "text")
    with pytest.raises(WriteFailed, match=kind):
        write_tensors(path, {"x": torch.zeros(1)})
    with pytest.raises(BadRequest, match=kind):
        require_replaceable(path)
    after = os.lstat(place)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert not list(tmp_path.glob(".*"))


def test_a_file_put_in_the_place_of_the_target_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def late() -> None:
        with atomic_file(path) as partial:
            partial.write_text("text")
            os.mkfifo(path)

    with pytest.raises(WriteFailed, match="a named pipe"):
        late()
    assert stat.S_ISFIFO(os.lstat(path).st_mode)


def test_a_link_stays_and_the_file_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("there", "new"):
        (tmp_path / name).symlink_to(f"folder/{name}")
    (tmp_path / "folder" / "there").write_text("earlier")
    for name in ("there", "new"):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "folder" / name).read_text() == "text"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(WriteFailed):
        write_text(tmp_path / "loop", "text")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.symlink_to("gone/x"), "a link to .*gone/x, whose folder does not exist"),
        (lambda path: path.symlink_to("/proc/none/x"), "whose folder does not exist"),
    ],
)
def test_a_link_into_a_missing_folder_is_refused_by_its_target(
    tmp_path: Path, make: Make, says: str
) -> None:
    make(tmp_path / "x")
    with pytest.raises(BadRequest, match=says):
        require_replaceable(tmp_path / "x")
    with pytest.raises(WriteFailed, match=says):
        write_text(tmp_path / "x", "text")


@pytest.mark.parametrize("place", ["gone/x", "gone/deeper/x", "file/x"])
def test_a_place_without_its_folder_is_refused_before_anything_is_computed(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(BadRequest, match=r"cannot write .*/x\n"):
        require_replaceable(tmp_path / place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to another user")
def test_a_link_of_another_user_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "x").symlink_to("mine")
    os.lchown(tmp_path / "x", 12345, 12345)
    with pytest.raises(WriteFailed, match="belongs to another user"):
        write_text(tmp_path / "x", "text")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_every_file_has_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    tmp_path.chmod(0o777)
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "x")
        write_tensors(tmp_path / "tensors", {"x": torch.zeros(1)})
    finally:
        os.umask(before)
    for name in ("text", "tensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask, name


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device", "a folder"])
def test_a_lock_is_made_of_a_file_alone(tmp_path: Path, kind: str) -> None:
    NO_FILES[kind](tmp_path / NAME)
    with pytest.raises(BadRequest, match="cannot lock"), locked_folder(tmp_path):
        raise AssertionError


def test_the_file_that_a_lock_link_names_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("text")
    (tmp_path / NAME).symlink_to("letter")
    with pytest.raises(BadRequest, match="which is a link"), locked_folder(tmp_path):
        raise AssertionError
    assert (tmp_path / "letter").read_text() == "text"


@pytest.mark.parametrize("name", ["cuda:128", "cuda:256", "cpu:1", "cpu:0"])
def test_a_device_that_torch_takes_for_another_is_unknown(name: str) -> None:
    """Its numbers have 8 bits: cuda:256 is cuda:0 there."""
    with pytest.raises(BadRequest, match=f"unknown device[\\s\\S]*{name}"):
        pick_device(name)


def test_paths_that_may_not_be_looked_up_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As below another user's folder, where Path.exists raises."""
    closed = tmp_path / "closed"
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if isinstance(path, str | Path) and str(path).startswith(str(closed)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    clip = closed / "0.mp4"
    for look in (
        lambda: find_clips(clip),
        lambda: find_pairs(clip, clip),
        lambda: read_drafts(["0-1"], closed),
        lambda: count_frames(clip),
    ):
        with pytest.raises(BadRequest):
            look()
