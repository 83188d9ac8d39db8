# SPDX-License-Identifier: Apache-2.0
"""`pw bench e2e` and `pw bench stages`: weights, programs, and whole runs of the commands."""

from __future__ import annotations

import io
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pw_bench.e2e import run as module
from pw_bench.e2e import session
from pw_bench.e2e import stages as stages_module
from pw_bench.e2e.process import ProcessRun, read_records, run_process
from pw_bench.e2e.run import build_engines, pick_programs
from pw_bench.e2e.weights import PROMPT, Weights, pick_weights
from pw_bench.e2e.worker import Task, make_clips
from pw_bench.measure.memory_sampler import MemorySampler
from pw_bench.results import Skipped, read_result
from pw_export.nano.captions import make_tokenizer
from pw_export.nano.train_draft import DIT
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.cli.bench import e2e, stages
from pw_runtime.errors import BadRequest, MissingPackage
from pw_runtime.presets import PRESETS
from pw_runtime.system.progress import Reporter
from tests.bench.programs import NO_JOB, ONE_STAGE, make_job
from tests.bench.small_results import CEILINGS
from tests.e2e.pw import write_preset

NANO = PRESETS["nano"]
CPU = torch.device("cpu")
FILES = Weights(name="a", checkpoint=Path(), bundle=Path(), digest="")


def test_programs_that_cannot_take_part_are_skipped_or_refused() -> None:
    skipped: list[Skipped] = []
    assert pick_programs((), NANO, FILES, CPU, skipped) == ("ours", "official")
    reasons = {part.part: part.reason for part in skipped}
    assert reasons["ours-triton"] == "it needs a CUDA GPU"
    assert "no high-res stage" in reasons["diffusers"]
    with pytest.raises(BadRequest, match="add --draft-only"):
        pick_programs(("diffusers",), NANO, FILES, CPU, [])
    memory = replace(FILES, in_memory="5b")
    assert pick_programs((), NANO, memory, CPU, []) == ("ours",)
    with pytest.raises(BadRequest, match=r"from files.*\n.*leave --side ours-engines out"):
        pick_programs(("ours-engines",), NANO, memory, CPU, [])


def test_without_the_package_that_compares_frames_nothing_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(MissingPackage, match=r"pip install 'scikit-image"):
        pick_programs(("official",), NANO, FILES, CPU, [])
    assert pick_programs(("ours",), NANO, FILES, CPU, []) == ("ours",)


def test_engines_are_built_for_the_measured_device_and_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", run)
    build_engines(replace(NO_JOB, precision="bf16"), tmp_path, Reporter(quiet=True))
    assert commands[0][-4:] == ["--device", "cpu", "--precision", "bf16"]


def test_only_the_built_in_presets_come_with_weights(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="none are named"):
        pick_weights("2k", None, None, tmp_path, print)
    with pytest.raises(BadRequest, match="both name the weights"):
        pick_weights("2k", tmp_path, "nano", tmp_path, print)
    assert pick_weights("2k", None, "5b", tmp_path, print).in_memory == "5b"
    built_in = pick_weights("nano", None, None, tmp_path, print)
    assert open_bundle(built_in.bundle).networks.draft.config == DIT  # the trained one


def test_prompt_consists_of_words_that_the_built_in_model_knows() -> None:
    assert "<unk>" not in make_tokenizer().encode(PROMPT).tokens


def test_missing_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    out = str(tmp_path / "no" / "r.json")
    for verb in (e2e, stages):
        ran = CliRunner().invoke(verb, ["--preset", "nano", "--out", out])
        assert isinstance(ran.exception, BadRequest)
        assert "mkdir -p" in str(ran.exception)


@pytest.fixture
def arguments(
    official_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Return options of a small run; ceilings, which have tests of their own, are not measured."""
    for name in (module, stages_module):
        monkeypatch.setattr(name, "measure_ceilings", lambda device, protocol: CEILINGS)
    preset = write_preset(tmp_path / "small.toml")
    return [
        *("--preset", str(preset), "--checkpoint", str(official_checkpoint)),
        *("--out", str(tmp_path / "r.json")),
    ]


def run_here(task: Task, environment: object, nvml: object) -> ProcessRun:
    """Do the work of a process in this one."""
    stdout, started = io.StringIO(), time.perf_counter()
    with MemorySampler(os.getpid(), None) as sampler:
        make_clips(task, stdout)
    return read_records(task, stdout.getvalue(), sampler, started)


def test_process_makes_a_cold_clip_and_warm_ones(official_checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(official_checkpoint, tmp_path, ONE_STAGE)
    (tmp_path / "clips").mkdir()
    task = Task(program="ours", job=job, folder=tmp_path / "clips", clips=2)
    run = run_process(task, {"OMP_NUM_THREADS": "1"}, None)
    cold, warm = run.clips
    assert [clip.start for clip in run.clips] == ["cold", "warm"]
    assert [span.name for span in cold.spans][:2] == ["process start", "imports"]
    assert "imports" not in {span.name for span in warm.spans}
    for clip in run.clips:
        assert clip.peaks["rss"] >= max(size for _, size in clip.host)
        assert clip.wall > 0
        assert 0 <= clip.unattributed < 0.5 * clip.wall  # a busy machine stops it between spans
        assert clip.predicted.keys() == clip.measured.keys() == {"text", "draft", "decode"}
    assert cold.wall > warm.wall
    assert run.threads == 1
    assert run.operations["attention"] == "reference"
    assert run.fallbacks == ()


def test_ours_beside_the_official_recipe(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "run_process", run_here)
    options = [*arguments, "--rounds", "1", "--warm", "1"]
    ran = CliRunner().invoke(e2e, options, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    result = read_result(tmp_path / "r.json")
    (equal,) = result.equivalence
    assert equal.label == "rounding"
    (ratio,) = result.ratios
    assert ratio.refused is None
    assert {figure.name for figure in result.figures} == {
        f"{program}/{measure}"
        for program in ("ours", "official")
        for measure in ("cold", "warm", "process memory")
    }
    assert {(clip.side, clip.start) for clip in result.clips} == {
        (program, start) for program in ("ours", "official") for start in ("cold", "warm")
    }
    assert result.identity.operations["attention"] == "reference"
    assert result.identity.libraries["FFmpeg"]
    assert {path.name for path in tmp_path.iterdir()} == {"small.toml", "r.json"}


def test_stages_of_clips(arguments: list[str], tmp_path: Path) -> None:
    options = [*arguments, "--clips", "2", "--steps", "2"]
    ran = CliRunner().invoke(stages, options, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    figures = {figure.name: figure for figure in read_result(tmp_path / "r.json").figures}
    assert len(figures["draft step"].samples) == len(figures["highres step"].samples) == 4
    assert len(figures["first chunk"].samples) == 2
    for name in ("draft step", "highres step", "first chunk", "chunk"):
        assert figures[name].flops
        assert figures[name].of_ceiling
    assert {"text", "condition", "load vae", "pack", "encode", "mux"} <= figures.keys()
