# SPDX-License-Identifier: Apache-2.0
"""`--conv`: what ran is in the receipt, and the two differ by rounding."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from pw_kernels import cpu_library
from tests.e2e.pw import Pw


@pytest.fixture(autouse=True)
def _needs_avx2() -> None:
    if reason := cpu_library.unavailable():
        pytest.skip(reason)


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.slow
def test_both_convolutions_make_the_same_clip_to_rounding(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path
) -> None:
    frames, used = {}, {}
    for conv in ("auto", "winograd", "onednn"):
        out = tmp_path / conv
        made = pw(
            "generate", "--model", bundle_dir, "--preset", preset, "--out", out, "--conv", conv,
            "--prompt", "a cat", "--codec", "ffv1", "--save-latents",
        )  # fmt: skip
        assert made.code == 0, made.err
        used[conv] = json.loads((out / "0.json").read_text())["options"]["conv"]
        frames[conv] = frames_of(out / "0.mkv").astype(int)
    assert used == {"auto": "winograd", "winograd": "winograd", "onednn": "onednn"}
    assert (frames["auto"] == frames["winograd"]).all()
    difference = abs(frames["winograd"] - frames["onednn"])
    assert difference.max() <= 1
    assert (difference != 0).mean() <= 1e-3


@pytest.mark.slow
def test_latents_are_decoded_as_their_run_would_or_as_asked(
    pw: Pw, bundle_dir: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--out", tmp_path / "run",
        "--prompt", "a cat", "--conv", "winograd", "--save-latents",
    )  # fmt: skip
    assert made.code == 0, made.err
    latents = tmp_path / "run" / "0.latents.safetensors"
    decode = ("decode", latents, "--model", bundle_dir, "--out")
    again = pw(*decode, tmp_path / "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "0.mp4").read_bytes() == (tmp_path / "run" / "0.mp4").read_bytes()

    monkeypatch.setenv("PW_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused = pw(*decode, tmp_path / "refused")
    assert refused.code == 2
    assert "no-such-compiler" in refused.err
    assert "--conv onednn" in refused.err
    asked = pw(*decode, tmp_path / "asked", "--conv", "onednn")
    assert asked.code == 0, asked.err
    receipt = json.loads((tmp_path / "asked" / "0.json").read_text())
    assert receipt["finished_from_latents"]["conv"] == "onednn"
