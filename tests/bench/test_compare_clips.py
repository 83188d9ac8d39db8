# SPDX-License-Identifier: Apache-2.0
"""`pw compare`: clips of two runs, beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.pw import Pw, write_preset


@pytest.fixture
def pw(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pw:
    return Pw(monkeypatch, capfd)


@pytest.fixture
def made(pw: Pw, bundle_dir: Path, tmp_path: Path):
    """Makes a clip in a folder of that name."""
    preset = write_preset(tmp_path / "small.toml")

    def run(name: str, *options: str) -> Path:
        ran = pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--prompt", "a cat",
            "--out", tmp_path / name, "--codec", "ffv1", "--save-latents", *options,
        )  # fmt: skip
        assert ran.code == 0, ran.err
        return tmp_path / name

    return run


def test_two_runs_of_one_command_do_not_differ_by_a_byte(pw: Pw, made) -> None:
    ended = pw("compare", made("a"), made("b"))
    assert ended.code == 0
    assert "no byte differs" in ended.out
    assert "highres 0.0e+00" in ended.out


def test_what_was_asked_otherwise_is_told_and_the_difference_drawn(
    pw: Pw, made, tmp_path: Path
) -> None:
    sheet, numbers = tmp_path / "sheet.png", tmp_path / "numbers.json"
    ended = pw(
        "compare", made("a"), made("b", "--precision", "bf16"),
        "--contact-sheet", sheet, "--json", numbers,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "options.precision: fp32 and bf16" in ended.out
    (pair,) = json.loads(numbers.read_text())
    assert 20 < pair["frames"]["psnr"] < 100
    assert 0 < pair["latents"]["draft_latent"] < 0.1
    with Image.open(sheet) as picture:
        assert len(picture.getcolors(2**24) or ()) > 10


def test_two_clips_are_compared_as_two_folders_are(pw: Pw, made) -> None:
    one = made("a") / "0.mkv"
    assert "no byte differs" in pw("compare", one, one).out


@pytest.mark.parametrize("case", ["missing", "mixed", "other clips", "empty"])
def test_what_cannot_be_compared_is_refused(pw: Pw, made, tmp_path: Path, case: str) -> None:
    folder = made("a")
    other = tmp_path / "other"
    other.mkdir()
    a, b, said = {
        "missing": (folder, tmp_path / "no", "is not there"),
        "mixed": (folder, folder / "0.mkv", "a clip and a folder"),
        "other clips": (folder, other, "do not hold the same clips"),
        "empty": (other, other, "no clips in"),
    }[case]
    ended = pw("compare", a, b)
    assert ended.code == 2
    assert said in ended.err
