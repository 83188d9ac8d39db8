# SPDX-License-Identifier: Apache-2.0
"""`Pipeline(draft_video=...)`: as `pw generate --draft-video`, with networks that stay loaded."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from pw_runtime import Pipeline, RunOptions
from pw_runtime.errors import BadRequest
from tests.e2e.pw import Pw, write_preset
from tests.inputs.videos import shades, write_video

PROMPT = "a red ball"


@pytest.fixture
def pw(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Pw:
    return Pw(monkeypatch, capfd)


def test_a_video_takes_the_place_of_the_draft_in_any_call(
    bundle_dir: Path, tmp_path: Path, pw: Pw
) -> None:
    """Calls with a video, without one, and with one again: each as the command line has it."""
    preset = write_preset(tmp_path / "small.toml")
    video = write_video(tmp_path / "a.mp4", shades(8), 24)
    ended = pw(
        "generate", "--model", bundle_dir, "--preset", preset, "--codec", "ffv1",
        "--prompt", PROMPT, "--out", tmp_path / "out", "--draft-video", video,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    with av.open(str(tmp_path / "out/0.mkv")) as container:
        wanted = np.stack([x.to_ndarray(format="rgb24") for x in container.decode(video=0)])
    options = RunOptions(codec="ffv1", device="cpu")
    with Pipeline.from_pretrained(bundle_dir, preset=preset, options=options) as pipe:
        first = pipe(PROMPT, draft_video=video).frames
        plain = pipe(PROMPT).frames
        between = pipe(PROMPT, draft_video=str(video), draft_strength=0.9).frames
        nothing = pipe(PROMPT, draft_video=video, draft_strength=1).frames
        again = pipe([PROMPT], draft_video=video)[0].frames
    assert np.array_equal(first, wanted)
    assert np.array_equal(again, wanted)
    assert np.array_equal(nothing, plain)
    assert not np.array_equal(between, plain)
    assert not np.array_equal(between, first)


def test_what_cannot_be_a_video_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    preset = write_preset(tmp_path / "small.toml")
    with Pipeline.from_pretrained(bundle_dir, preset=preset, device="cpu") as pipe:
        with pytest.raises(BadRequest, match="draft_video has a wrong type"):
            pipe(PROMPT, draft_video=np.zeros((5, 64, 96, 3)))  # type: ignore[call-overload]
        with pytest.raises(BadRequest, match="no clip has one"):
            pipe(PROMPT, draft_strength=0.9)
        with pytest.raises(BadRequest, match="missing"):
            pipe(PROMPT, draft_video=tmp_path / "missing.mp4")
