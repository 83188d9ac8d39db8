# SPDX-License-Identifier: Apache-2.0
"""`pw bench generate-memory` and `decoder-memory`: what their figures are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from pw_bench.e2e.process import ProcessRun, ProgramFailed
from pw_bench.e2e.worker import Task
from pw_bench.peers import decoder_memory, generate_memory
from pw_bench.peers.generate_memory import figures_of
from pw_bench.results import read_result
from pw_export.nano import NANO_VAE
from pw_runtime.cli.bench import bench
from pw_runtime.errors import BadResult
from tests.bench.small_results import CLIP, span

MADE = replace(
    CLIP,
    spans=(span("highres", 0, 3), span("step 1", 1, 2, 1), span("decode", 3, 9)),
    host=((0.0, 10), (1.0, 40), (2.9, 20), (5.0, 90)),
    peaks={"rss": 100},
)


def test_decode_adds_what_lies_above_the_memory_at_its_start() -> None:
    figures = {figure.name: figure.samples for figure in figures_of(MADE, 1000)}
    assert figures == {
        "ours/peak": (100,),
        "ours/peak before the decode": (40,),
        "ours/added by the decode": (80,),
        "ours/the clip in fp32": (1000,),
    }


def test_every_length_is_a_clip_of_its_own_process(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    def run_process(task: Task, environment: object, nvml: object) -> ProcessRun:
        lengths.append(task.job.preset.video.frames)
        assert task.job.noise.exists()
        return ProcessRun(clips=(MADE,), engines={"vae": "eager"}, operations={"pack": "cpu"})

    monkeypatch.setattr(generate_memory, "run_process", run_process)
    out = tmp_path / "r.json"
    arguments = f"--out {out} --width 64 --height 32 --frames 5 --frames 9".split()
    ran = CliRunner().invoke(
        bench, ["generate-memory", "--model", str(bundle_dir), *arguments], catch_exceptions=False
    )
    assert ran.exit_code == 0, ran.output
    result = read_result(out)
    assert lengths == [5, 9]
    assert (result.identity.engines, result.identity.operations) == (
        {"vae": "eager"},
        {"pack": "cpu"},
    )
    assert [clip.side for clip in result.clips] == ["5 frames", "9 frames"]
    held = {figure.name: figure.median for figure in result.figures if figure.counted}
    assert held["9 frames/the clip in fp32"] == 3 * 64 * 32 * 4 * 9


def test_clip_that_fails_ends_the_measurement(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_process(*_: object) -> ProcessRun:
        raise ProgramFailed("no such file")

    monkeypatch.setattr(generate_memory, "run_process", run_process)
    with pytest.raises(BadResult, match="no such file"):
        generate_memory.measure_generate_memory(bundle_dir, 64, 32, (5,), print)


def test_decoder_memory_is_beside_its_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_memory, "VAE", NANO_VAE)
    out = tmp_path / "r.json"
    arguments = f"decoder-memory --out {out} --rows 4 --columns 4 --frames 1"
    ran = CliRunner().invoke(bench, arguments.split(), catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    figures = {figure.name: figure for figure in read_result(out).figures}
    items = [figure.median for name, figure in figures.items() if name.startswith("predicted, ")]
    assert figures["decoder/predicted"].median == sum(items)
    assert figures["decoder/process memory"].median > 0
    assert figures["decoder/CPU time"].median > 0
