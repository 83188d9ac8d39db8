# SPDX-License-Identifier: Apache-2.0
"""However a conversion ends, its name is either absent or stands for a complete bundle."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
from safetensors import SafetensorError

from pw_export.convert import convert
from pw_runtime.checkpoint.bundle import open_bundle, verify
from pw_runtime.errors import BadRequest, WriteFailed
from tests.convert.layouts import quietly
from tests.oracle.checkpoint import Checkpoint

# Converts, and waits to be killed once the first network is on the disk.
CONVERT_AND_WAIT = """
import sys, time
from pathlib import Path
from pw_export.convert import convert

def say(line):
    print(line, flush=True)
    if line.startswith("vae:"):
        time.sleep(300)

convert(wan=Path(sys.argv[1]), out=Path(sys.argv[2]), say=say)
"""


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_killed_convert_leaves_no_bundle_and_the_next_one_cleans_up(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT_AND_WAIT, str(checkpoint.base), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("vae:"):
            break
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    partial = f".bundle.{process.pid}.partial"
    assert names(tmp_path) == [partial, ".bundle.lock"]
    assert (tmp_path / partial / "draft").is_dir()

    lines: list[str] = []
    verify(convert(wan=checkpoint.base, out=out, say=lines.append))
    assert names(tmp_path) == ["bundle"]
    assert f"removing {partial}, left by a process that was killed" in lines


def test_leftover_of_the_own_number_is_removed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """In containers every run may have the same process number."""
    (tmp_path / f".bundle.{os.getpid()}.partial" / "draft").mkdir(parents=True)
    quietly(tmp_path / "bundle", wan=checkpoint.base)
    assert names(tmp_path) == ["bundle"]


def test_work_of_a_living_process_and_of_other_names_is_left_alone(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    others = [f".bundle.{os.getppid()}.partial", ".bundle.x.partial", ".bundle2.999999999.partial"]
    for other in others:
        (tmp_path / other).mkdir()
    quietly(tmp_path / "bundle", wan=checkpoint.base)
    assert names(tmp_path) == sorted([*others, "bundle"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_any_exception_removes_what_was_written(
    error: type[BaseException], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    def say(line: str) -> None:
        if line.startswith("vae:"):
            assert names(tmp_path) == [f".bundle.{os.getpid()}.partial", ".bundle.lock"]
            raise error

    with pytest.raises(error):
        convert(wan=checkpoint.base, out=tmp_path / "bundle", say=say)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
)
def test_disk_that_fills_up_is_a_write_failure_and_leaves_nothing(
    error: Exception, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", refuse)
    with pytest.raises(WriteFailed, match=r"cannot write .*model-00001-of-00001[\s\S]*No space"):
        quietly(tmp_path / "bundle", wan=checkpoint.base)
    assert names(tmp_path) == []


def test_too_little_room_is_found_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**30, 2**30, 1000))
    with pytest.raises(WriteFailed, match=r"not enough room[\s\S]*MiB free[\s\S]*do this: free"):
        quietly(tmp_path / "bundle", wan=checkpoint.base)
    assert names(tmp_path) == []


def test_unwritable_parent_is_a_write_failure(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailed, match=r"cannot write .*bundle[\s\S]*do this"):
        quietly(tmp_path / "file" / "bundle", wan=checkpoint.base)


def test_missing_parents_are_created(checkpoint: Checkpoint, tmp_path: Path) -> None:
    quietly(tmp_path / "a" / "b" / "bundle", wan=checkpoint.base)
    bundle = open_bundle(tmp_path / "a" / "b" / "bundle")
    verify(bundle)
    assert bundle.networks.highres is None


def test_bundle_that_appeared_meanwhile_is_not_overwritten(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"

    def say(line: str) -> None:
        if line.startswith("vae:"):
            out.mkdir()
            (out / "mine").write_text("")

    with pytest.raises(WriteFailed, match="bundle"):
        convert(wan=checkpoint.base, out=out, say=say)
    assert names(tmp_path) == ["bundle"]
    assert names(out) == ["mine"]


def test_refused_out_is_found_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BadRequest, match="exists already"):
        quietly(tmp_path / "bundle", wan=tmp_path / "nowhere")
