# SPDX-License-Identifier: Apache-2.0
"""A disk that is full, read-only or away: computing ends in time, or waits, and nothing is lost."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pw_runtime import pipeline
from pw_runtime.errors import WriteFailed
from pw_runtime.job import clip as clip_module
from pw_runtime.job import run as run_module
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
    write_receipt = clip_module.write_receipt

    def refused(receipt, path):
        if path.name == "0.json":
            raise FULL
        write_receipt(receipt, path)

    monkeypatch.setattr(clip_module, "write_receipt", refused)
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

    def gone(*arguments):
        drafts.append(denoise_draft(*arguments))
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
    assert "draft_latent" in load_file(rescued[1])


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
