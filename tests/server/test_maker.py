# SPDX-License-Identifier: Apache-2.0
"""A worker that goes on with a draft of other options or a damaged one, and how its jobs fail."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pw_runtime import pipeline
from pw_runtime.errors import BadRequest, BadResult, OtherDraft, WriteFailed
from pw_runtime.job import clip as clip_module
from pw_runtime.job.latents import check_latents
from pw_runtime.presets import find_preset
from pw_runtime.server.files import LATENTS
from pw_runtime.server.maker import Maker
from pw_runtime.server.messages import Drafted, Event, Join, Make, Undrafted
from pw_runtime.system.stop import StopRequest
from pw_runtime.types import Preset, RunOptions
from tests.e2e.pw import write_preset

pytestmark = pytest.mark.slow


def make(
    bundle: Path,
    job: Path,
    *,
    draft_only: bool,
    precision: str = "fp32",
    finishes: str | None = None,
) -> list[tuple[type, bool]]:
    """Make a job; return what was said of its draft, each time with whether that was there."""
    told: list[tuple[type, bool]] = []

    def send(event: Event) -> None:
        if isinstance(event, Drafted | Undrafted):
            told.append((type(event), (job / "draft" / "0.mp4").exists()))

    preset = find_preset(str(write_preset(job.with_suffix(".toml"))))
    options = RunOptions(device="cpu", precision=precision)  # type: ignore[arg-type]
    maker = Maker(Join(model=str(bundle), presets={"small": preset}, options=options), send)
    maker.make(order_of(job, preset, draft_only=draft_only, finishes=finishes), StopRequest())
    return told


def order_of(job: Path, preset: Preset, *, draft_only: bool, finishes: str | None = None) -> Make:
    """The order to make a clip, or its draft, in a folder."""
    return Make(
        job="video_1",
        folder=str(job),
        prompt="a fox runs through snow",
        negative="",
        seed=1,
        preset=preset,
        draft_only=draft_only,
        finishes=finishes,
    )


def test_networks_of_another_preset_are_released_before_a_job(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made of the preset, so that no job takes them again, and no plan counts them."""
    small = find_preset(str(write_preset(tmp_path / "small.toml")))
    presets = {"small": small, "smaller": replace(small, video=replace(small.video, frames=1))}
    options = RunOptions(device="cpu", precision="fp32")
    maker = Maker(Join(model=str(bundle_dir), presets=presets, options=options), lambda _: None)
    monkeypatch.setattr(maker, "_draft", lambda *_: None)
    closed: list[str] = []
    for name in ("small", "small", "smaller"):
        maker.make(order_of(tmp_path, presets[name], draft_only=True), StopRequest())
        assert closed == (["small"] if name == "smaller" else [])
        maker._warm.only = None
        maker._warm.keep("draft", "it", name, closed.append)


def precision_of(video: Path) -> str:
    return str(json.loads(video.with_suffix(".json").read_text())["options"]["precision"])


def test_a_job_with_a_draft_of_other_options_makes_it_again(
    bundle_dir: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    make(bundle_dir, job, draft_only=True, precision="fp32")
    told = make(bundle_dir, job, draft_only=False, precision="bf16")
    assert told == [(Drafted, True), (Undrafted, True), (Drafted, True)]
    for part in ("draft", "final"):
        assert precision_of(job / part / "0.mp4") == "bf16"


def test_the_draft_of_another_job_is_never_replaced_by_another(
    bundle_dir: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    make(bundle_dir, job, draft_only=True, precision="fp32")
    with pytest.raises(OtherDraft, match=r"the draft of video_0 cannot be[\s\S]*options.precision"):
        make(bundle_dir, job, draft_only=False, precision="bf16", finishes="video_0")
    assert precision_of(job / "draft" / "0.mp4") == "fp32"


def cut(latents: Path) -> None:
    latents.write_bytes(latents.read_bytes()[:100])


def strip_metadata(latents: Path) -> None:
    save_file(load_file(latents), latents)


def flip(latents: Path) -> None:
    content = latents.read_bytes()
    latents.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "no complete safetensors file"),
        (strip_metadata, "without the metadata"),
        (flip, "damaged: "),
    ],
)
def test_a_damaged_draft_is_made_again_by_its_own_job_alone(
    damage: Callable[[Path], None], told: str, bundle_dir: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    make(bundle_dir, job, draft_only=True)
    damage(job / "draft" / LATENTS)
    with pytest.raises(OtherDraft, match=rf"the draft of video_0 cannot be[\s\S]*{told}"):
        make(bundle_dir, job, draft_only=False, finishes="video_0")
    make(bundle_dir, job, draft_only=False)
    assert (job / "final" / "0.mp4").is_file()
    check_latents(job / "draft" / LATENTS, None)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (WriteFailed("cannot write the file"), WriteFailed),
        (BadRequest("no such thing"), BadRequest),
        (MemoryError(), BadResult),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
)
def test_a_job_ends_with_the_kind_of_error_that_its_stage_raised(
    error: Exception,
    kind: type[Exception],
    bundle_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "denoise_draft", fails)
    with pytest.raises(kind):
        make(bundle_dir, tmp_path / "job", draft_only=True)


def test_a_job_whose_folder_refuses_its_latents_leaves_nothing_outside(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: latents in /tmp, which nobody removed."""
    write_latents, elsewhere = clip_module.write_latents, tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))

    def full(path: Path, *arguments: Any) -> None:
        if elsewhere not in path.parents:
            raise WriteFailed("cannot write the file")
        write_latents(path, *arguments)

    def fails(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(clip_module, "write_latents", full)
    monkeypatch.setattr(pipeline, "decode_clip", fails)
    with pytest.raises(ZeroDivisionError):
        make(bundle_dir, tmp_path / "job", draft_only=True)
    assert list(elsewhere.iterdir()) == []


def test_a_failed_job_leaves_no_tensors(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[weakref.ref[torch.Tensor]] = []

    def fails(*arguments: object, **options: object) -> None:
        tensor = torch.zeros(1)
        left.append(weakref.ref(tensor))
        raise MemoryError

    monkeypatch.setattr(pipeline, "denoise_draft", fails)
    preset = find_preset(str(write_preset(tmp_path / "small.toml")))
    options = RunOptions(device="cpu", precision="fp32")
    maker = Maker(
        Join(model=str(bundle_dir), presets={"a": preset}, options=options), lambda _: None
    )
    with suppress(BadResult):
        maker.make(order_of(tmp_path / "job", preset, draft_only=True), StopRequest())
    maker.recover()
    assert left
    assert not any(reference() is not None for reference in left)
