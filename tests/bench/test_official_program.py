# SPDX-License-Identifier: Apache-2.0
"""The official program of the benchmark makes the clip that the runtime makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pw_bench.e2e.job import Job
from pw_bench.e2e.official_program import OfficialProgram
from pw_bench.official import files
from pw_runtime.types import Compat, Preset
from tests.bench.programs import (
    ONE_STAGE,
    TWO_STAGES,
    make_job,
    read_video,
    run_traced,
    runtime_latents,
)
from tests.closeness import max_abs, relative_l2

OFFICIAL_BYTES = Compat(truncating_uint8=True)
STEPS = ["step 1", "step 2", "step 3"]


def official_tiling(preset: Preset) -> Preset:
    """Use the strips and the bytes of the official code in the runtime too."""
    decode = replace(preset.decode, tiling="official")
    return replace(preset, decode=decode, compat=OFFICIAL_BYTES)


@pytest.mark.parametrize("preset", [ONE_STAGE, TWO_STAGES], ids=["draft", "highres"])
def test_official_program_makes_the_clip_of_the_runtime(
    official_checkpoint: Path, tmp_path: Path, preset: Preset
) -> None:
    job = make_job(official_checkpoint, tmp_path, official_tiling(preset), codec="ffv1")
    clip = run_traced(OfficialProgram(), job, tmp_path / "theirs.mkv")
    expected = runtime_latents(job, tmp_path / "ours")
    last = list(preset.stages())[-1]
    assert max_abs(clip.latents[-1], expected[f"{last}_latent"]) <= 1e-4
    assert max_abs(clip.latents[2], expected["draft_latent"]) <= 1e-4
    theirs, frames = read_video(tmp_path / "theirs.mkv"), read_video(tmp_path / "ours" / "0.mkv")
    assert clip.frames == preset.video.frames
    assert max_abs(theirs, frames) <= 1


def test_official_program_marks_its_work_by_spans(
    official_checkpoint: Path, tmp_path: Path
) -> None:
    program = OfficialProgram()
    job = make_job(official_checkpoint, tmp_path, TWO_STAGES)
    draft, highres = ["text", "draft", *STEPS], ["text", "condition", "highres", *STEPS[:2]]
    cold = run_traced(program, job, tmp_path / "cold.mp4")
    assert cold.spans == ["load", *draft, *highres, "load", "decode", "encode"]
    assert len(cold.latents) == 5
    warm = run_traced(program, job, tmp_path / "warm.mp4")
    assert warm.spans == cold.spans
    assert (tmp_path / "warm.mp4").read_bytes() == (tmp_path / "cold.mp4").read_bytes()


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of files that are read from now on."""
    read: list[str] = []
    for name in ("load_base", "load_pth", "load_pixelwizard"):

        def load(path: Path, *more: object, real: object = getattr(files, name)) -> object:
            read.append(path.name)
            return real(path, *more)

        monkeypatch.setattr(files, name, load)
    return read


def test_second_clip_loads_only_the_vae_of_its_decode(
    official_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = count_loads(monkeypatch)
    program = OfficialProgram()
    job = make_job(official_checkpoint, tmp_path, TWO_STAGES)
    program.clip(job, tmp_path / "cold.mp4")
    assert read.count(files.TEXT_ENCODER) == 2
    assert read.count(files.VAE) == 3
    read.clear()
    program.clip(job, tmp_path / "warm.mp4")
    assert read == [files.VAE]


def test_in_bf16_it_differs_from_fp32_by_what_bf16_rounds(
    official_checkpoint: Path, tmp_path: Path
) -> None:
    job = make_job(official_checkpoint, tmp_path, ONE_STAGE)
    fp32 = first_step(job, tmp_path / "fp32.mp4")
    bf16 = first_step(replace(job, precision="bf16"), tmp_path / "bf16.mp4")
    assert bf16.dtype == torch.float32
    assert 0 < relative_l2(bf16, fp32) <= 3e-2


def first_step(job: Job, video: Path) -> Tensor:
    return run_traced(OfficialProgram(), job, video).latents[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "bf16"}, "loaded for"),
        ({"preset": replace(ONE_STAGE, compat=Compat(bf16_timesteps=True))}, "several GPUs"),
        ({"preset": replace(ONE_STAGE, video=replace(ONE_STAGE.video, frames=5))}, "noise"),
    ],
)
def test_jobs_that_it_cannot_do_are_refused(
    official_checkpoint: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    program = OfficialProgram()
    job = make_job(official_checkpoint, tmp_path, ONE_STAGE)
    program.clip(job, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=message):
        program.clip(replace(job, **change), tmp_path / "b.mp4")
    assert not (tmp_path / "b.mp4").exists()
