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

from pw_bench.e2e.diffusers_program import Diffusers, scheduler
from pw_bench.e2e.programs import told
from pw_runtime.errors import BadRequest
from pw_runtime.presets import DRAFT as FULL_DRAFT
from pw_runtime.sampling.schedule import make_schedule
from pw_runtime.types import Compat, Preset, StageConfig, VideoConfig
from tests.bench.programs import (
    DRAFT,
    HIGHRES,
    ONE_STAGE,
    TWO_STAGES,
    make,
    make_job,
    ours,
    read_video,
    write_checkpoint,
)
from tests.closeness import max_abs, relative_l2

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("diffusers"))


def test_pipeline_makes_the_clip_of_the_runtime(checkpoint: Path, tmp_path: Path) -> None:
    preset = replace(ONE_STAGE, compat=Compat(truncating_uint8=True))
    job = make_job(checkpoint, tmp_path, preset, codec="ffv1")
    made = make(Diffusers(compiled=False), job, tmp_path / "theirs.mkv")
    wanted = ours(job, tmp_path / "ours")["draft_latent"]
    assert len(made.latents) == DRAFT.steps
    # Their sinusoids and rotary tables are fp32's, and guidance multiplies what comes of it.
    assert relative_l2(made.latents[-1], wanted) <= 1e-4
    theirs, frames = read_video(tmp_path / "theirs.mkv"), read_video(tmp_path / "ours" / "0.mkv")
    assert made.frames == preset.video.frames
    assert max_abs(theirs, frames) <= 2


def test_pipeline_says_what_it_does(checkpoint: Path, tmp_path: Path) -> None:
    program = Diffusers(compiled=False)
    job = make_job(checkpoint, tmp_path, ONE_STAGE)
    cold = make(program, job, tmp_path / "cold.mp4")
    steps = ["step 1", "step 2", "step 3"]
    assert cold.spans == ["load", "text", "draft", *steps, "decode", "encode"]
    warm = make(program, job, tmp_path / "warm.mp4")
    assert warm.spans == cold.spans
    assert (tmp_path / "warm.mp4").read_bytes() == (tmp_path / "cold.mp4").read_bytes()


def test_in_bf16_it_differs_from_fp32_by_what_bf16_rounds(checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(checkpoint, tmp_path, ONE_STAGE)
    fp32 = make(Diffusers(compiled=False), job, tmp_path / "fp32.mp4").latents[0]
    program = Diffusers(compiled=False)
    bf16 = make(program, replace(job, precision="bf16"), tmp_path / "bf16.mp4").latents[0]
    assert bf16.dtype == torch.float32
    assert 0 < relative_l2(bf16, fp32) <= 3e-2


def test_a_result_names_its_version() -> None:
    from importlib.metadata import version

    assert version("diffusers") in told("diffusers-compiled")
    assert "(" not in told("ours")


@pytest.mark.parametrize("plan", [FULL_DRAFT, DRAFT, HIGHRES], ids=["50/5.0", "3/5.0", "2/5.5"])
def test_their_scheduler_is_on_the_official_sigmas(plan: StageConfig) -> None:
    theirs, wanted = scheduler(plan), make_schedule(plan.solver, plan.steps, plan.shift)
    theirs.set_timesteps(plan.steps)
    assert tuple(theirs.sigmas.tolist()) == wanted.sigmas
    assert tuple(theirs.timesteps.tolist()) == wanted.timesteps


@pytest.mark.parametrize(
    ("preset", "word"),
    [
        (TWO_STAGES, "adapter"),
        (replace(ONE_STAGE, draft=replace(DRAFT, solver="dpm++")), r"dpm\+\+"),
        (replace(ONE_STAGE, draft=replace(DRAFT, guidance=1.0)), "guidance"),
        (replace(ONE_STAGE, compat=Compat(bf16_einsum=True)), "roundings"),
    ],
)
def test_what_the_pipeline_does_not_make_is_refused_before_loading(
    tmp_path: Path, preset: Preset, word: str
) -> None:
    job = make_job(tmp_path / "no such checkpoint", tmp_path, preset)
    with pytest.raises(BadRequest, match=word):
        Diffusers(compiled=False).clip(job, tmp_path / "a.mp4")


@pytest.mark.slow
def test_compiled_pipeline_compiles_where_it_says_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[float] = []  # when

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        compiled.append(time.perf_counter())
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    job = make_job(checkpoint, tmp_path, replace(ONE_STAGE, video=VideoConfig(frames=17)))
    program = Diffusers(compiled=True)
    eager = make(Diffusers(compiled=False), job, tmp_path / "eager.mp4")
    cold = make(program, job, tmp_path / "cold.mp4")
    assert relative_l2(cold.latents[-1], eager.latents[-1]) <= 1e-6
    told = [one for one in cold.timeline if one.name == "compile"]
    assert len(told) == 4
    assert compiled
    assert all(any(one.start < when < one.end for one in told) for when in compiled)
    done = len(compiled)
    warm = make(program, job, tmp_path / "warm.mp4")
    assert len(compiled) == done
    assert "compile" not in warm.spans
