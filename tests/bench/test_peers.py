# SPDX-License-Identifier: Apache-2.0
"""Networks beside diffusers': outputs agree, and the results file has every sample."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from pw_bench.peers import cpu_conv, dit, subprocess_ab, vae
from pw_bench.peers.subprocess_ab import Sample, measure, ratios_of, run_child, serve
from pw_bench.results import Result, read_result
from pw_kernels import cpu_library
from pw_runtime.cli.bench import bench
from pw_runtime.errors import BadRequest
from tests.bench.small_results import figure

MODULES = {"dit-peers": dit, "vae-peers": vae}
SIZES = {
    "dit-peers": "--dim 384 --layers 2 --width 128 --height 64 --frames 9 --steps 2 --part 5",
    "vae-peers": "--width 64 --height 64 --frames 5 --strips 2",
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Result]:
    """Run a verb of `pw bench`, its samples in this process."""

    def go(verb: str) -> Result:
        pytest.importorskip("diffusers")
        module: ModuleType = MODULES[verb]

        def run_child(
            name: str, contender: str, work: object, file: Path, *, count_tensors: bool
        ) -> Sample:
            assert name == module.__name__
            return measure(*module.prepare(contender, work), file, count_tensors=count_tensors)

        monkeypatch.setattr(subprocess_ab, "run_child", run_child)
        out = tmp_path / "result.json"
        arguments = [verb, "--out", str(out), "--rounds", "1", *SIZES[verb].split()]
        ran = CliRunner().invoke(bench, arguments, catch_exceptions=False)
        assert ran.exit_code == 0, ran.output
        return read_result(out)

    return go


def tensors_of(result: Result) -> dict[str, float]:
    """Return counted bytes by contender, and check for one sample of everything."""
    assert all(len(figure.samples) == 1 for figure in result.figures)
    figures = {figure.name: figure.median for figure in result.figures}
    assert len(figures) == 4 * len(result.sides)
    return {name: figures[f"{name}/tensors"] for name in result.sides}


def test_transformer_in_chunks_equals_diffusers_after_a_stage(run: Callable[[str], Result]) -> None:
    result = run("dit-peers")
    assert "24 tokens" in result.scope["clip"]  # in five chunks
    tensors = tensors_of(result)
    assert list(tensors) == [dit.DIFFUSERS, dit.PER_TOKEN, dit.OURS]
    # diffusers computes its sinusoids in fp32, and guidance multiplies the difference.
    assert all(difference.relative_l2 <= 1e-5 for difference in result.differences)
    assert tensors[dit.DIFFUSERS] > tensors[dit.OURS] > 0


def test_decoder_in_bands_equals_diffusers_to_one_level(run: Callable[[str], Result]) -> None:
    result = run("vae-peers")
    tensors = tensors_of(result)
    assert list(tensors) == [vae.DIFFUSERS, vae.TILED, vae.OURS]
    ours = result.differences[-1]
    assert (ours.side, ours.unit) == (vae.OURS, "levels of 255")
    assert ours.max_abs <= 1
    assert ours.share <= 1e-3
    assert tensors[vae.DIFFUSERS] > tensors[vae.OURS] > 0


def test_our_cpp_beside_onednn_has_errors_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := cpu_library.unavailable():
        pytest.skip(reason)

    def run_child(
        name: str, contender: str, work: object, file: Path, *, count_tensors: bool
    ) -> Sample:
        assert isinstance(work, cpu_conv.DecodeWork)
        return measure(*cpu_conv.prepare(contender, work), file, count_tensors=count_tensors)

    monkeypatch.setattr(subprocess_ab, "run_child", run_child)
    work = cpu_conv.DecodeWork(decoder="trained nano", width=96, height=64, frames=5, strips=2)
    result = cpu_conv.measure_cpu_conv(
        1, convolutions=[(16, 12, 1, 16, 16)], decodes=[work], say=lambda line: None
    )
    conv, decode = result.ratios
    assert (conv.side, decode.side) == ("conv 16-12 1x16x16 winograd", f"{work.name} winograd")
    assert conv.cpu_time is not None
    onednn, winograd, levels = result.differences
    assert (onednn.against, winograd.against) == ("fp64", "fp64")
    assert winograd.relative_l2 <= 4 * onednn.relative_l2
    assert levels.max_abs <= 1


def test_child_serves_what_the_parent_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child runs in this process; what goes through the pipe is the same."""
    asked: list[tuple[str, object]] = []

    def prepare(contender: str, work: vae.VaeWork) -> tuple[subprocess_ab.Run, list[torch.Tensor]]:
        asked.append((contender, work))
        return lambda: torch.arange(3), []

    def start(command: list[str], *, input: str, **_: object) -> SimpleNamespace:
        monkeypatch.setattr("sys.argv", command[2:])
        monkeypatch.setattr("sys.stdin", io.StringIO(input))
        serve(vae.VaeWork, prepare)
        return SimpleNamespace(stdout=capsys.readouterr().out)

    monkeypatch.setattr(subprocess_ab.subprocess, "run", start)
    work, file = vae.VaeWork(width=32, height=64, frames=5, strips=2), tmp_path / "out.pt"
    timed, counted = (
        run_child("some.module", "ours", work, file, count_tensors=count) for count in (False, True)
    )
    assert asked == [("ours", work)] * 2
    assert timed.seconds > 0
    assert (counted.seconds, counted.peak_bytes) == (0, 24)  # three int64
    assert torch.load(file).tolist() == [0, 1, 2]


def test_ratios_are_those_of_the_medians_and_none_without_a_divisor() -> None:
    figures = [
        *(figure("ours/time", 1, 2, 9), figure("theirs/time", 4, 4, 5)),
        *(figure("ours/CPU time", 1), figure("theirs/CPU time", 3)),
        *(figure("ours/process memory", 1), figure("theirs/process memory", 0)),
        *(figure("ours/tensors", 1), figure("theirs/tensors", 4)),
    ]
    (ratio,) = ratios_of(figures, "ours", ("theirs",))
    assert (ratio.time, ratio.cpu_time, ratio.memory, ratio.tensors) == (2, 3, None, 0.25)


def test_sizes_that_the_network_cannot_have_are_refused(tmp_path: Path) -> None:
    arguments = ["dit-peers", "--out", str(tmp_path / "r.json"), "--frames", "8"]
    ran = CliRunner().invoke(bench, arguments)
    assert isinstance(ran.exception, BadRequest)
    assert "frames 4n+1" in str(ran.exception)
