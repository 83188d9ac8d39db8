# SPDX-License-Identifier: Apache-2.0
"""`pw demo`: clips of the built-in model from nothing but the package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pw_export.bundle_cache import demo_bundle
from pw_runtime.checkpoint.bundle import open_bundle, verify
from tests.e2e.pw import Pw


def test_the_built_in_model_is_written_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PW_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    bundle = demo_bundle(said.append)
    assert bundle.parent == tmp_path / "cache" / "bundles"
    assert said == [f"writing the built-in model once, to {bundle}"]
    verify(open_bundle(bundle))
    assert demo_bundle(said.append) == bundle
    assert len(said) == 1
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name], "no lock stays"


@pytest.mark.slow
def test_six_clips_and_their_sheet_appear_and_a_second_run_is_no_error(
    pw: Pw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = pw("demo", "--device", "cpu")
    assert ended.code == 0, ended.err
    names = [f"{number}{ending}" for number in range(6) for ending in (".json", ".mp4")]
    files = sorted(x for x in os.listdir("pw-demo") if not x.startswith("."))
    assert files == [*names, "contact_sheet.png"]
    assert ended.out.splitlines() == [f"pw-demo/{number}.mp4" for number in range(6)]
    assert pw("verify", "pw-demo").out.endswith("6 clips checked: nothing is missing or altered\n")
    assert "your own: pw generate --model " in ended.err
    before = os.stat("pw-demo/5.mp4").st_mtime_ns
    assert pw("demo", "--device", "cpu", "--quiet").code == 0
    assert os.stat("pw-demo/5.mp4").st_mtime_ns == before, "finished clips stay"
    Path("pw-demo/0.json").unlink()  # as if 0.mp4 were somebody's own
    ended = pw("demo", "--device", "cpu", "--quiet")
    assert ended.code == 2
    assert "0.mp4: a video without a receipt" in ended.err
