# SPDX-License-Identifier: Apache-2.0
"""`pw compare`: clips of two runs, side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.pipeline import generate
from pw_runtime.presets import find_preset
from pw_runtime.prompts import make_prompts
from pw_runtime.system.progress import Reporter
from pw_runtime.types import Precision, Request, RunOptions
from tests.e2e.pw import Pw, write_preset


@pytest.fixture
def pw(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pw:
    return Pw(monkeypatch, capfd)


@pytest.fixture(scope="module")
def runs(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make folders of clips: two runs of one command, and one in bf16."""
    folder = tmp_path_factory.mktemp("runs")
    preset = write_preset(folder / "small.toml")
    request = Request(
        prompts=make_prompts([("0", "a cat")]),
        preset=find_preset(str(preset)),
        out=folder / "a",
        options=RunOptions(codec="ffv1", save_latents=True),
    )
    precisions: dict[str, Precision] = {"a": "fp32", "b": "fp32", "bf16": "bf16"}
    for name, precision in precisions.items():
        options = replace(request.options, precision=precision)
        run = replace(request, out=folder / name, options=options)
        (outcome,) = generate(run, open_bundle(bundle_dir), Reporter(quiet=True))
        assert outcome.error is None
    return {name: folder / name for name in precisions}


def test_two_runs_of_one_command_do_not_differ_by_a_byte(pw: Pw, runs: dict[str, Path]) -> None:
    ended = pw("compare", runs["a"], runs["b"])
    assert ended.code == 0
    assert "no byte differs" in ended.out
    assert "highres 0.0e+00" in ended.out


def test_changed_settings_are_listed_and_the_difference_is_drawn(
    pw: Pw, runs: dict[str, Path], tmp_path: Path
) -> None:
    sheet, numbers = tmp_path / "sheet.png", tmp_path / "numbers.json"
    ended = pw("compare", runs["a"], runs["bf16"], "--contact-sheet", sheet, "--json", numbers)
    assert ended.code == 0, ended.err
    assert "options.precision: fp32 and bf16" in ended.out
    (pair,) = json.loads(numbers.read_text())
    assert 20 < pair["frames"]["psnr"] < 100
    assert 0 < pair["latents"]["draft_latent"] < 0.1
    with Image.open(sheet) as picture:
        assert len(picture.getcolors(2**24) or ()) > 10


def test_two_clips_are_compared_as_two_folders_are(pw: Pw, runs: dict[str, Path]) -> None:
    clip = runs["a"] / "0.mkv"
    assert "no byte differs" in pw("compare", clip, clip).out


@pytest.mark.parametrize("case", ["missing", "mixed", "other clips", "empty"])
def test_paths_that_cannot_be_compared_are_refused(
    pw: Pw, runs: dict[str, Path], tmp_path: Path, case: str
) -> None:
    folder, empty = runs["a"], tmp_path / "empty"
    empty.mkdir()
    a, b, message = {
        "missing": (folder, tmp_path / "no", "does not exist"),
        "mixed": (folder, folder / "0.mkv", "cannot compare a clip with a folder"),
        "other clips": (folder, empty, "do not hold the same clips"),
        "empty": (empty, empty, "no clips in"),
    }[case]
    ended = pw("compare", a, b)
    assert ended.code == 2
    assert message in ended.err


def _not_utf8(path: Path) -> None:
    path.write_bytes(b"caf\xe9 \xff" * 100)


BAD_CLIPS = {
    "text": lambda path: path.write_text("no video", encoding="utf-8"),
    "text of another encoding": _not_utf8,
    "empty": lambda path: path.write_bytes(b""),
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("kind", BAD_CLIPS)
@pytest.mark.parametrize("first", [True, False])
def test_what_is_no_video_is_one_error(
    pw: Pw, runs: dict[str, Path], tmp_path: Path, kind: str, first: bool
) -> None:
    bad, good = tmp_path / "bäd.mp4", runs["a"] / "0.mkv"
    BAD_CLIPS[kind](bad)
    ended = pw("compare", *((bad, good) if first else (good, bad)))
    assert ended.code == 2
    assert str(bad) in ended.err
    assert "do this:" in ended.err or "wanted:" in ended.err
    assert "Traceback" not in ended.err


def test_a_truncated_video_is_one_error(pw: Pw, runs: dict[str, Path], tmp_path: Path) -> None:
    content = (runs["a"] / "0.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    ended = pw("compare", tmp_path / "cut.mkv", runs["a"] / "0.mkv")
    assert ended.code == 2
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"\xff\xfe", b"[" * 200_000])
def test_a_damaged_receipt_is_named(
    pw: Pw, runs: dict[str, Path], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "0.mkv").write_bytes((runs["a"] / "0.mkv").read_bytes())
    (tmp_path / "0.json").write_bytes(content)
    ended = pw("compare", tmp_path / "0.mkv", runs["a"] / "0.mkv")
    assert ended.code == 2
    assert f"{tmp_path / '0.json'} is not the receipt of a clip" in ended.err


def test_damaged_latents_are_named(pw: Pw, runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "0.mkv").write_bytes((runs["a"] / "0.mkv").read_bytes())
    (tmp_path / "0.latents.safetensors").write_bytes(b"no tensors")
    ended = pw("compare", tmp_path / "0.mkv", runs["a"] / "0.mkv")
    assert ended.code == 2
    assert str(tmp_path / "0.latents.safetensors") in ended.err
