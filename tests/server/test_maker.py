# SPDX-License-Identifier: Apache-2.0
"""A worker whose server was started again with other options, in the midst of a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pw_runtime.errors import OtherDraft
from pw_runtime.presets import find_preset
from pw_runtime.server.maker import Maker
from pw_runtime.server.messages import Join, Make
from pw_runtime.system.stop import StopRequest
from pw_runtime.types import RunOptions
from tests.e2e.pw import write_preset

pytestmark = pytest.mark.slow


def make(
    bundle: Path, job: Path, *, draft_only: bool, precision: str, finishes: str | None = None
) -> None:
    preset = find_preset(str(write_preset(job.with_suffix(".toml"))))
    options = RunOptions(device="cpu", precision=precision)  # type: ignore[arg-type]
    maker = Maker(
        Join(model=str(bundle), presets={"small": preset}, options=options), list().append
    )
    order = Make(
        job="video_1",
        folder=str(job),
        prompt="a fox runs through snow",
        negative="",
        seed=1,
        preset=preset,
        draft_only=draft_only,
        finishes=finishes,
    )
    maker.make(order, StopRequest())


def precision_of(video: Path) -> str:
    return str(json.loads(video.with_suffix(".json").read_text())["options"]["precision"])


def test_a_job_with_a_draft_of_other_options_makes_it_again(
    bundle_dir: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    make(bundle_dir, job, draft_only=True, precision="fp32")
    make(bundle_dir, job, draft_only=False, precision="bf16")
    for part in ("draft", "final"):
        assert precision_of(job / part / "0.mp4") == "bf16"


def test_the_draft_of_another_job_is_never_replaced_by_another(
    bundle_dir: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    make(bundle_dir, job, draft_only=True, precision="fp32")
    with pytest.raises(OtherDraft, match="the draft of video_0 was made with other options"):
        make(bundle_dir, job, draft_only=False, precision="bf16", finishes="video_0")
    assert precision_of(job / "draft" / "0.mp4") == "fp32"
