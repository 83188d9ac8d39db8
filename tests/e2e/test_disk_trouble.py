# SPDX-License-Identifier: Apache-2.0
"""A disk that is full, read-only or away: computing ends in time, or waits, and nothing is lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pw_runtime import pipeline
from pw_runtime.errors import BadRequest, WriteFailed
from pw_runtime.job import clip as clip_module
from pw_runtime.job import clip_receipt as receipt_module
from pw_runtime.job import run as run_module
from pw_runtime.system.folder_lock import NAME, locked_folder
from tests.e2e.pw import Ended, Pw

LATENTS = "0.latents.safetensors"
FULL = WriteFailed("cannot write the file", got="No space left on device")
Generate = Callable[..., Ended]


@pytest.fixture
def generate(pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path) -> Generate:
    def run(*arguments: object) -> Ended:
        return pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "out",
            "--codec", "ffv1", "--prompt", "a cat", "--prompt", "a dog", *arguments,
        )  # fmt: skip

    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_receipt_that_cannot_be_written_leaves_no_video_without_one(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_receipt = receipt_module.write_receipt

    def refused(receipt, path):
        if path.name == "0.json":
            raise FULL
        write_receipt(receipt, path)

    monkeypatch.setattr(receipt_module, "write_receipt", refused)
    ended = generate()
    assert ended.code == 3
    assert "prompt 0 failed: cannot write the file" in ended.err
    assert names(tmp_path / "out") == [LATENTS, "1.json", "1.mkv"]


def test_a_full_disk_ends_the_decoding_of_what_is_safe_on_it(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: every further clip was decoded for minutes, and refused."""
    decoded = []

    def full(vae, run, clip, step):
        decoded.append(clip.prompt.id)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
        raise FULL

    monkeypatch.setattr(pipeline, "decode_clip", full)
    ended = generate()
    assert ended.code == 3
    assert decoded == ["0"]
    assert "prompt 1 failed: not enough room" in ended.err
    assert names(tmp_path / "out") == [LATENTS, "1.latents.safetensors"]
    assert ended.err.count("to finish this clip, run: pw decode") == 2


def test_a_folder_that_is_gone_is_noticed_at_the_first_draft(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoise_draft, drafts = pipeline.denoise_draft, []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def gone(*arguments, **options):
        drafts.append(denoise_draft(*arguments, **options))
        shutil.rmtree(tmp_path / "out")
        return drafts[-1]

    monkeypatch.setattr(pipeline, "denoise_draft", gone)
    ended = generate()
    assert ended.code == 3
    assert len(drafts) == 1
    assert "Traceback" not in ended.err
    assert f"create the folder {tmp_path / 'out'}" in ended.err
    rescued = re.search(r"the results so far of 0 are kept in (\S+)", ended.err)
    assert rescued is not None
    assert "draft_latent" in load_file(rescued[1].rstrip(";"))
    assert f"to go on from them, move the file to {tmp_path / 'out'}" in ended.err


def test_wait_for_disk_waits_and_goes_on(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_latents, waits = clip_module.write_latents, []

    def refused_twice(*arguments):
        if len(waits) < 2:
            raise FULL
        write_latents(*arguments)

    monkeypatch.setattr(clip_module, "write_latents", refused_twice)
    monkeypatch.setattr(run_module.time, "sleep", waits.append)
    ended = generate("--wait-for-disk")
    assert ended.code == 0, ended.err
    assert waits == [run_module.RETRY_SECONDS] * 2
    assert ended.err.count("waiting until this can be written") == 1
    assert names(tmp_path / "out") == ["0.json", "0.mkv", "1.json", "1.mkv"]


def test_a_draft_in_the_spill_folder_is_gone_on_with_and_leaves_nothing(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: the output folder's file, with the text alone, hid the draft."""
    write_latents, spill = clip_module.write_latents, tmp_path / "spill"
    spill.mkdir()

    def full_after_the_text(path, provenance, tensors):
        if path.parent != spill and "draft_latent" in tensors:
            raise FULL
        write_latents(path, provenance, tensors)

    def fails(*arguments, **options):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(clip_module, "write_latents", full_after_the_text)
        patch.setattr(pipeline, "denoise_highres", fails)
        assert generate("--spill-dir", spill).code == 3
    assert names(spill) == [LATENTS, "1.latents.safetensors"]
    assert names(tmp_path / "out") == []
    ended = generate("--spill-dir", spill)
    assert ended.code == 0, ended.err
    assert f"prompt 0: going on at the highres stage, with what {spill / LATENTS} has" in ended.err
    assert names(spill) == []
    assert names(tmp_path / "out") == ["0.json", "0.mkv", "1.json", "1.mkv"]


def test_of_two_files_of_a_clip_the_one_with_more_is_gone_on_with(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed between writing into the spill folder and removing the other file."""
    spill, out = tmp_path / "spill", tmp_path / "out"
    spill.mkdir()

    def fails(*arguments, **options):
        raise FULL

    for stage, folder in (("denoise_draft", out), ("denoise_highres", spill)):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, stage, fails)
            assert generate("--out", folder).code == 3
    ended = generate("--spill-dir", spill)
    assert ended.code == 0, ended.err
    assert f"prompt 0: going on at the highres stage, with what {spill / LATENTS} has" in ended.err
    assert names(spill) == []
    assert names(out) == ["0.json", "0.mkv", "1.json", "1.mkv"]


def test_no_contact_sheet_is_told(generate: Generate, tmp_path: Path) -> None:
    assert generate().code == 0
    ended = generate("--contact-sheet")
    assert ended.code == 0
    assert "no contact sheet: it shows the clips that a run makes" in ended.err
    assert not (tmp_path / "out" / "contact_sheet.png").exists()


def test_a_folder_without_room_for_a_name_is_locked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: a traceback, on a disk that was full to the last byte."""

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with (
        locked_folder(tmp_path),
        pytest.raises(BadRequest, match="another run is writing"),
        locked_folder(tmp_path),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_full_disk_is_no_bad_request_where_the_folder_is_made_and_locked(
    call: str, generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)

    def full(path: Any, *arguments: Any, **options: Any) -> Any:
        if Path(path) in (tmp_path / "out", tmp_path / "out" / NAME):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, call, full)
    ended = generate()
    assert ended.code == 3, ended.err
    assert f"got: {os.strerror(errno.ENOSPC)}" in ended.err


def test_a_decode_of_two_folders_looks_for_room_in_each(
    generate: Generate, pw: Pw, bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        assert generate("--draft-only", "--save-latents", "--out", folder).code == 0
        for name in ("0.mkv", "0.json"):
            (folder / name).unlink()
    looked: list[Path] = []
    monkeypatch.setattr(run_module, "require_room", lambda folder, size: looked.append(folder))
    files = [folder / LATENTS for folder in folders]
    assert pw("decode", *files, "--model", bundle_dir).code == 0
    assert looked == folders
