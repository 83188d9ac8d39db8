# SPDX-License-Identifier: Apache-2.0
"""The diffusers program of the benchmark makes the clip that the runtime makes, where it can."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from pw_bench.e2e import diffusers_program
from pw_bench.e2e.diffusers_program import (
    DiffusersProgram,
    LoadedPipeline,
    load_pipeline,
    scheduler,
)
from pw_bench.e2e.job import Job
from pw_bench.e2e.programs import describe
from pw_runtime.errors import BadRequest
from pw_runtime.presets import DRAFT as FULL_DRAFT
from pw_runtime.sampling.schedule import make_schedule
from pw_runtime.types import Compat, Preset, StageConfig, VideoConfig
from tests.bench.programs import (
    DRAFT,
    HIGHRES,
    ONE_STAGE,
    TWO_STAGES,
    make_job,
    read_video,
    run_traced,
    runtime_latents,
)
from tests.closeness import max_abs, relative_l2

pytest.importorskip("diffusers")


def test_pipeline_makes_the_clip_of_the_runtime(official_checkpoint: Path, tmp_path: Path) -> None:
    preset = replace(ONE_STAGE, compat=Compat(truncating_uint8=True))
    job = make_job(official_checkpoint, tmp_path, preset, codec="ffv1")
    clip = run_traced(DiffusersProgram(compiled=False), job, tmp_path / "theirs.mkv")
    expected = runtime_latents(job, tmp_path / "ours")["draft_latent"]
    assert len(clip.latents) == DRAFT.steps
    # Their sinusoids and rotary tables are in fp32, and guidance multiplies the difference.
    assert relative_l2(clip.latents[-1], expected) <= 1e-4
    theirs, frames = read_video(tmp_path / "theirs.mkv"), read_video(tmp_path / "ours" / "0.mkv")
    assert clip.frames == preset.video.frames
    assert max_abs(theirs, frames) <= 2


def test_pipeline_marks_its_work_by_spans(official_checkpoint: Path, tmp_path: Path) -> None:
    program = DiffusersProgram(compiled=False)
    job = make_job(official_checkpoint, tmp_path, ONE_STAGE)
    cold = run_traced(program, job, tmp_path / "cold.mp4")
    steps = ["step 1", "step 2", "step 3"]
    assert cold.spans == ["load", "text", "draft", *steps, "decode", "encode"]
    warm = run_traced(program, job, tmp_path / "warm.mp4")
    assert warm.spans == cold.spans
    assert (tmp_path / "warm.mp4").read_bytes() == (tmp_path / "cold.mp4").read_bytes()


def test_in_bf16_it_differs_from_fp32_by_what_bf16_rounds(
    official_checkpoint: Path, tmp_path: Path
) -> None:
    job = make_job(official_checkpoint, tmp_path, ONE_STAGE)
    fp32 = run_traced(DiffusersProgram(compiled=False), job, tmp_path / "fp32.mp4").latents[0]
    program = DiffusersProgram(compiled=False)
    bf16 = run_traced(program, replace(job, precision="bf16"), tmp_path / "bf16.mp4").latents[0]
    assert bf16.dtype == torch.float32
    assert 0 < relative_l2(bf16, fp32) <= 3e-2


def test_description_has_the_version() -> None:
    from importlib.metadata import version

    assert version("diffusers") in describe("diffusers-compiled")
    assert "(" not in describe("ours")


@pytest.mark.parametrize("config", [FULL_DRAFT, DRAFT, HIGHRES], ids=["50/5.0", "3/5.0", "2/5.5"])
def test_their_scheduler_is_on_the_official_sigmas(config: StageConfig) -> None:
    theirs = scheduler(config)
    expected = make_schedule(config.solver, config.steps, config.shift)
    theirs.set_timesteps(config.steps)
    assert tuple(theirs.sigmas.tolist()) == expected.sigmas
    assert tuple(theirs.timesteps.tolist()) == expected.timesteps


@pytest.mark.parametrize(
    ("preset", "word"),
    [
        (TWO_STAGES, "adapter"),
        (replace(ONE_STAGE, draft=replace(DRAFT, solver="dpm++")), r"dpm\+\+"),
        (replace(ONE_STAGE, draft=replace(DRAFT, guidance=1.0)), "guidance"),
        (replace(ONE_STAGE, compat=Compat(bf16_einsum=True)), "roundings"),
    ],
)
def test_clips_that_the_pipeline_cannot_make_are_refused_before_loading(
    tmp_path: Path, preset: Preset, word: str
) -> None:
    job = make_job(tmp_path / "no such checkpoint", tmp_path, preset)
    with pytest.raises(BadRequest, match=word):
        DiffusersProgram(compiled=False).clip(job, tmp_path / "a.mp4")


def load_shallow_pipeline(job: Job) -> LoadedPipeline:
    """Load the pipeline and keep one of several equal blocks: tracing takes seconds a block."""
    loaded = load_pipeline(job)
    loaded.pipeline.transformer.blocks = loaded.pipeline.transformer.blocks[:1]
    for block in loaded.pipeline.vae.decoder.up_blocks:
        block.resnets = block.resnets[:1]
    return loaded


@pytest.mark.slow
def test_compiled_pipeline_compiles_inside_spans_of_that_name(
    official_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[float] = []  # when

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        compiled.append(time.perf_counter())
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(diffusers_program, "load_pipeline", load_shallow_pipeline)
    job = make_job(official_checkpoint, tmp_path, replace(ONE_STAGE, video=VideoConfig(frames=13)))
    program = DiffusersProgram(compiled=True)
    eager = run_traced(DiffusersProgram(compiled=False), job, tmp_path / "eager.mp4")
    cold = run_traced(program, job, tmp_path / "cold.mp4")
    assert relative_l2(cold.latents[-1], eager.latents[-1]) <= 1e-6
    spans = [span for span in cold.timeline if span.name == "compile"]
    assert len(spans) == 4
    assert compiled
    assert all(any(span.start < when < span.end for span in spans) for when in compiled)
    count = len(compiled)
    warm = run_traced(program, job, tmp_path / "warm.mp4")
    assert len(compiled) == count
    assert "compile" not in warm.spans
