# SPDX-License-Identifier: Apache-2.0
"""Two processes that make one bundle: the second waits, verifies and takes what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pw_export.convert
from pw_export.bundle_cache import cached_bundle
from pw_export.convert import convert
from pw_export.one_conversion import fingerprint, one_conversion
from pw_runtime.checkpoint.bundle import MANIFEST, open_bundle, verify
from pw_runtime.errors import BadRequest
from tests.oracle.checkpoint import Checkpoint

# Converts, and waits for a line of input when the first network is on the disk.
FIRST = """
import sys
from pathlib import Path
from pw_export.bundle_cache import cached_bundle
from pw_export.convert import convert

def say(line):
    if line.startswith("vae:"):
        print("half", flush=True)
        sys.stdin.readline()

wan, out = Path(sys.argv[1]), sys.argv[2]
if out:
    convert(wan=wan, out=Path(out), say=say)
else:
    cached_bundle(wan=wan, draft=None, highres=None, say=say)
"""


@contextmanager
def first_process(wan: Path, out: Path | str, cache: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a conversion in another process and stop it half way."""
    process = subprocess.Popen(
        [sys.executable, "-c", FIRST, str(wan), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PW_CACHE": str(cache)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == "half\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


class Second:
    """Lines of the second conversion; the line that it waits lets the first one go on, or end."""

    def __init__(self, first: subprocess.Popen[str], *, kill: bool = False) -> None:
        self.first, self.kill = first, kill
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if line.startswith("waiting for process"):
            if self.kill:
                self.first.kill()
                self.first.wait()  # else its number stays in use
            else:
                assert self.first.stdin is not None
                self.first.stdin.write("\n")
                self.first.stdin.flush()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_second_of_two_conversions_verifies_and_takes_the_bundle_of_the_first(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    with first_process(checkpoint.base, out, tmp_path) as first:
        second = Second(first)
        bundle = convert(wan=checkpoint.base, out=out, say=second)
        assert first.wait() == 0
    assert second.lines == [
        f"waiting for process {first.pid}, which is making {out}",
        f"{out} was made by another process meanwhile; every file in it was verified",
    ]
    assert bundle == open_bundle(out)
    verify(bundle)
    assert names(tmp_path) == ["bundle"]


@pytest.mark.slow
def test_second_conversion_makes_the_bundle_where_the_first_was_killed(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    with first_process(checkpoint.base, out, tmp_path) as first:
        second = Second(first, kill=True)
        verify(convert(wan=checkpoint.base, out=out, say=second))
    assert second.lines[-1] == f"wrote {out}"
    assert names(tmp_path) == ["bundle"]


@pytest.mark.slow
def test_other_checkpoint_for_the_same_name_is_refused_at_once(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    with first_process(checkpoint.base, out, tmp_path) as first:
        match = f"process {first.pid} is making .*bundle from another[\\s\\S]*another --out"
        with pytest.raises(BadRequest, match=match):
            convert(wan=checkpoint.base, draft=checkpoint.draft, out=out, say=lambda line: None)
        assert first.poll() is None


@pytest.mark.slow
def test_second_of_two_first_uses_takes_the_cached_bundle_of_the_first(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PW_CACHE", str(tmp_path))
    with first_process(checkpoint.base, "", tmp_path) as first:
        second = Second(first)
        bundle = cached_bundle(wan=checkpoint.base, draft=None, highres=None, say=second)
        assert first.wait() == 0
    assert any("was made by another process meanwhile" in line for line in second.lines)
    assert names(tmp_path / "bundles") == [bundle.name]


def test_bundle_finished_between_the_look_and_the_lock_is_taken_only_if_it_is_the_same(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """No process is waited for then: only the bundle itself says what it was made from."""
    out = tmp_path / "bundle"
    made = convert(wan=checkpoint.base, out=out, say=lambda line: None)
    again = {"wan": checkpoint.base, "out": out, "highres": None, "ema": False}
    lines: list[str] = []
    same = pw_export.convert.convert_once(**again, draft=None, say=lines.append)
    assert same == made
    with pytest.raises(BadRequest, match="exists already"):
        pw_export.convert.convert_once(**again, draft=checkpoint.draft, say=lines.append)


def test_damaged_bundle_of_another_process_is_not_taken(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from pw_runtime.errors import BadWeights

    out = tmp_path / "bundle"
    made = convert(wan=checkpoint.base, out=out, say=lambda line: None)
    content = json.loads((out / MANIFEST).read_text())
    content["files"][made.networks.vae.files[0]]["sha256"] = "0" * 64
    (out / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BadWeights, match="was altered or damaged"):
        pw_export.convert.convert_once(
            wan=checkpoint.base, out=out, draft=None, highres=None, ema=False, say=print
        )


class Waits(Exception):
    """Raised in place of waiting."""


def test_sources_of_any_length_are_known_again(tmp_path: Path) -> None:
    """Seen: with a LoRA their text was longer than what was read of the lock."""

    def say(line: str) -> None:
        raise Waits(line)

    out = tmp_path / "bundle"
    with one_conversion(out, "x" * 200, say):
        with (
            pytest.raises(Waits, match=f"waiting for process {os.getpid()}"),
            one_conversion(out, "x" * 200, say),
        ):
            pass
        with (
            pytest.raises(BadRequest, match="from another checkpoint"),
            one_conversion(out, "x" * 199 + "y", say),
        ):
            pass


def folder_of_links(folder: Path, **links: Path) -> Path:
    folder.mkdir()
    for name, target in links.items():
        (folder / name).symlink_to(target)
    return folder


@pytest.fixture
def versions(tmp_path: Path) -> list[Path]:
    """Two folders of weights of the same size and time."""
    folders = [tmp_path / "v1", tmp_path / "v2"]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(folder.name.encode())
        os.utime(folder / "model.safetensors", (1, 1))
    return folders


def test_sources_differ_where_a_linked_folder_is_another(
    versions: list[Path], tmp_path: Path
) -> None:
    """Seen: the bundle of the first was taken for the second."""
    wan = folder_of_links(tmp_path / "wan", transformer=versions[0])
    before = fingerprint(wan, None, None)
    assert fingerprint(wan, None, None) == before
    (wan / "transformer").unlink()
    (wan / "transformer").symlink_to(versions[1])
    assert fingerprint(wan, None, None) != before


def test_folders_with_nothing_but_links_are_different_sources(
    versions: list[Path], tmp_path: Path
) -> None:
    links = dict(zip(("transformer", "vae"), versions, strict=True))
    swapped = dict(zip(("vae", "transformer"), versions, strict=True))
    first = folder_of_links(tmp_path / "first", **links)
    second = folder_of_links(tmp_path / "second", **swapped)
    assert fingerprint(first, None, None) != fingerprint(second, None, None)


def test_files_that_no_conversion_reads_do_not_make_another_source(versions: list[Path]) -> None:
    """Seen: every picture that ComfyUI made had its checkpoint converted once more."""
    wan = versions[0]
    before = fingerprint(wan, None, None)
    for name in ("output/0.png", "models/loras/style.safetensors", "0.mp4"):
        (wan / name).parent.mkdir(parents=True, exist_ok=True)
        (wan / name).write_bytes(b"x")
    assert fingerprint(wan, None, None) == before
    (wan / "models" / "vae").mkdir()
    (wan / "models" / "vae" / "wan2.2_vae.safetensors").write_bytes(b"x")
    assert fingerprint(wan, None, None) != before


def test_a_link_to_a_folder_above_it_adds_nothing(versions: list[Path], tmp_path: Path) -> None:
    before = fingerprint(versions[0], None, None)
    (versions[0] / "back").symlink_to(tmp_path)
    assert fingerprint(versions[0], None, None) == before
