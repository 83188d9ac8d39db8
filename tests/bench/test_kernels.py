# SPDX-License-Identifier: Apache-2.0
"""The kernel bench where there is no GPU: it checks and reports; times mean nothing here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pw_bench.kernels import run as module
from pw_bench.kernels.cases import Case, Maker
from pw_bench.kernels.cases_decoder import decoder_cases
from pw_bench.kernels.cases_transformer import transformer_cases
from pw_bench.kernels.run import check, kernels
from pw_bench.measure import peaks, timing
from pw_bench.measure.timing import QUICK, Protocol, time_all
from pw_bench.results import Figure, Result, read_result
from pw_kernels.interpreter import install_exact_casts
from pw_runtime.errors import BadRequest
from tests.bench.results_made import result

install_exact_casts()
CPU = torch.device("cpu")
CASES = {
    case.name: case
    for make in [Maker(CPU, interpreted=True)]
    for case in (*transformer_cases("tiny", make), *decoder_cases("tiny", make))
}
# one program an element or a few: tens of seconds when interpreted, and tested elsewhere
SLOW = ("shortcut", "pack_frames", "pack_yuv")


@pytest.mark.parametrize("name", CASES)
def test_every_implementation_is_as_exact_as_its_dtype(name: str) -> None:
    case = CASES[name]
    for implementation in case.implementations:
        if implementation == "triton" and name in SLOW:
            continue
        row = check(case, implementation)
        assert row.refused is None
        assert row.error is not None
        assert row.error < 4e-3
        assert row.same_twice
        assert row.finite in (True, None)


def test_a_wrong_kernel_is_seen() -> None:
    case = CASES["gate_residual"]
    broken = replace(case, call=lambda x, y, gate: torch.empty_like(x).copy_(x))
    row = check(broken, "reference")
    assert row.error is not None
    assert row.error > 0.1


def test_memory_that_is_not_written_is_seen() -> None:
    broken = replace(CASES["gate_residual"], call=lambda x, y, gate: torch.empty_like(x))
    assert check(broken, "reference").finite is False


def test_a_refusal_is_a_row() -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("no such thing\nand more")

    row = check(replace(CASES["gate_residual"], call=refuse), "reference")
    assert row.refused == "no such thing"
    assert row.error is None


def test_an_error_that_is_no_runtime_error_is_a_refusal_too() -> None:
    class OutOfResources(Exception):  # as Triton's
        pass

    def refuse(*arguments: object) -> None:
        raise OutOfResources

    broken = replace(CASES["gate_residual"], call=refuse)
    assert check(broken, "reference").refused == "OutOfResources"


def run(monkeypatch: pytest.MonkeyPatch, out: Path, measured: Any, only: str = "") -> Result:
    """`pw bench kernels` on tiny sizes, `measured` in the place of its `measure`."""
    monkeypatch.setattr(module, "measure", measured)
    arguments = ["--sizes", "tiny", "--quick", "--only", only, "--out", str(out)]
    ran = CliRunner().invoke(kernels, arguments, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return read_result(out)


def test_an_operation_that_nothing_can_run_does_not_take_the_others_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = module.measure

    def measured(case: Case, *rest: Any) -> list[module.Measured]:
        def refuse(*arguments: object) -> None:
            raise RuntimeError("out of memory")

        first = case.name == "gate_residual"
        return whole(replace(case, call=refuse) if first else case, *rest)

    taken = run(monkeypatch, tmp_path / "r.json", measured, "_")
    refusals = {row.figure.split("/")[0]: row.refused for row in taken.kernels}
    assert refusals["gate_residual"] == "out of memory"
    assert None in refusals.values()


def test_convolutions_are_held_against_the_faster_of_product_and_convolution() -> None:
    case = next(case for case in CASES.values() if case.op == "causal_conv3d")
    case = replace(case, implementations=("reference",))
    known = result().ceilings
    fast = replace(known.convolution, rate=2 * known.gemm.rate)
    for made, best in ((known, known.gemm), (replace(known, convolution=fast), fast)):
        ((row, figure),) = module.measure(case, CPU, made, QUICK)
        assert figure.of_ceiling == pytest.approx(row.rate / best.rate)


def test_operations_before_ctrl_c_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, names = module.measure, []

    def measured(case: Case, *rest: Any) -> list[module.Measured]:
        if names:
            raise KeyboardInterrupt
        names.append(case.name)
        return whole(case, *rest)

    taken = run(monkeypatch, tmp_path / "r.json", measured)
    assert [row.figure.split("/")[0] for row in taken.kernels] == names
    assert taken.skipped[-1].reason == "interrupted"


def test_a_name_that_no_operation_has_is_refused(tmp_path: Path) -> None:
    ran = CliRunner().invoke(kernels, ["--sizes", "tiny", "--only", "soup"])
    assert isinstance(ran.exception, BadRequest)
    assert "gate_residual" in str(ran.exception)


def test_result_file(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--sizes", "tiny", "--only", "gate_residual", "--quick", "--out", str(out)]
    ran = CliRunner().invoke(kernels, arguments)
    assert ran.exit_code == 0, ran.output
    assert "gate_residual" in ran.output
    taken = read_result(out)
    assert taken.ceilings.gemm.rate > 0
    (row,), (figure,) = taken.kernels, taken.figures
    assert row.figure == figure.name
    assert len(figure.samples) == QUICK.rounds * QUICK.samples_per_round
    assert row.rate == pytest.approx(figure.bytes / figure.median)
    assert row.error_ratio == 1
    assert [one.part for one in taken.skipped] == ["kernels on a GPU"]


def test_candidates_take_turns() -> None:
    order: list[str] = []
    candidates = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = time_all(candidates, CPU, QUICK)
    assert order == ["a", "b"] * 4  # once to warm up, then three rounds
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_the_memory_of_the_ceilings_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(peaks, "_measured", lambda *_: done.append("measured"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("given back"))
    peaks.measure_ceilings(torch.device("cuda"), QUICK)
    assert done == ["measured", "given back"]


def test_what_counts_as_stable() -> None:
    def figure(*samples: float) -> Figure:
        return Figure(name="a", unit="s", samples=samples)

    assert figure(1.0, 1.01, 1.02, 0.99).stable
    assert not figure(1.0, 1.5, 1.0, 0.8).stable
    assert not figure(1.0, 1.0).stable  # two samples prove nothing
    assert figure(3.0, 1.0, 2.0).median == 2.0
    assert figure(*range(11)).spread == (1.0, 9.0)


def test_unstable_samples_are_taken_again_and_the_first_ones_kept(monkeypatch) -> None:
    seconds = iter([1.0, 2.0, 3.0, 4.0] + [5.0] * 4)
    monkeypatch.setattr(timing, "_cpu_sample", lambda run, device: next(seconds))
    protocol = Protocol(warmup_seconds=0.0, rounds=2, samples_per_round=2)
    figure = time_all({"a": lambda: None}, CPU, protocol)["a"]
    assert figure.rejected == (1.0, 2.0, 3.0, 4.0)
    assert figure.samples == (5.0,) * 4
