# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark without a GPU: it checks and reports; times mean nothing here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from pw_bench.kernels import run as module
from pw_bench.kernels.cases import Case, CaseTensors
from pw_bench.kernels.cases_decoder import decoder_cases
from pw_bench.kernels.cases_transformer import transformer_cases
from pw_bench.kernels.run import check
from pw_bench.measure.timing import QUICK
from pw_bench.results import Result, read_result
from pw_kernels.interpreter import install_exact_casts
from pw_runtime.cli.bench import kernels
from pw_runtime.cli.main import Terminated
from pw_runtime.errors import BadRequest
from tests.bench.small_results import CEILINGS

install_exact_casts()
CPU = torch.device("cpu")
CASES = {
    case.name: case
    for tensors in [CaseTensors(CPU, interpreted=True)]
    for case in (*transformer_cases("tiny", tensors), *decoder_cases("tiny", tensors))
}
# Few elements per program: tens of seconds when interpreted, and tested elsewhere.
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


def test_wrong_kernel_is_detected() -> None:
    case = CASES["gate_residual"]
    broken = replace(case, call=lambda x, y, gate: torch.empty_like(x).copy_(x))
    row = check(broken, "reference")
    assert row.error is not None
    assert row.error > 0.1


def test_unwritten_memory_is_detected() -> None:
    broken = replace(CASES["gate_residual"], call=lambda x, y, gate: torch.empty_like(x))
    assert check(broken, "reference").finite is False


def test_refusal_is_a_row() -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("no such thing\nand more")

    row = check(replace(CASES["gate_residual"], call=refuse), "reference")
    assert row.refused == "no such thing"
    assert row.error is None


def test_error_that_is_no_runtime_error_is_a_refusal_too() -> None:
    class OutOfResources(Exception):  # as Triton's
        pass

    def refuse(*arguments: object) -> None:
        raise OutOfResources

    broken = replace(CASES["gate_residual"], call=refuse)
    assert check(broken, "reference").refused == "OutOfResources"


def run(
    monkeypatch: pytest.MonkeyPatch, out: Path, measured: Any, only: str = "", **options: Any
) -> Result:
    """`pw bench kernels` on tiny sizes, with `measured` in place of its `measure`."""
    monkeypatch.setattr(module, "measure", measured)
    arguments = ["--sizes", "tiny", "--quick", "--only", only, "--out", str(out)]
    ran = CliRunner().invoke(kernels, arguments, catch_exceptions=False, **options)
    assert ran.exit_code == 0, ran.output
    return read_result(out)


def test_operation_that_nothing_can_run_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = module.measure

    def measured(case: Case, *rest: Any) -> list[module.Measured]:
        def refuse(*arguments: object) -> None:
            raise RuntimeError("out of memory")

        first = case.name == "gate_residual"
        return whole(replace(case, call=refuse) if first else case, *rest)

    result = run(monkeypatch, tmp_path / "r.json", measured, "_")
    refusals = {row.figure.split("/")[0]: row.refused for row in result.kernels}
    assert refusals["gate_residual"] == "out of memory"
    assert None in refusals.values()


@pytest.mark.parametrize("fit", [0, 3])
def test_case_that_does_not_fit_is_rows_of_refusals(fit: int) -> None:
    """Seen: its arguments were made once more, out of memory again, and that ended the run."""
    case, made = CASES["gate_residual"], []

    def arguments() -> tuple[Any, ...]:
        made.append(len(made))
        if len(made) > fit:
            raise RuntimeError("out of memory")
        return case.arguments()

    large = replace(case, arguments=arguments, implementations=("reference",))
    ((row, figure),) = module.measure(large, CPU, CEILINGS, QUICK)
    assert (row.refused, row.error, figure) == ("out of memory", None, None)
    assert len(made) == fit + 1


def test_convolutions_are_compared_with_the_faster_of_product_and_convolution() -> None:
    case = next(case for case in CASES.values() if case.op == "causal_conv3d")
    case = replace(case, implementations=("reference",))
    slow = replace(CEILINGS.convolution, rate=CEILINGS.gemm.rate / 2)
    fast = replace(CEILINGS.convolution, rate=2 * CEILINGS.gemm.rate)
    for convolution, best in ((slow, CEILINGS.gemm), (fast, fast)):
        ceilings = replace(CEILINGS, convolution=convolution)
        ((row, figure),) = module.measure(case, CPU, ceilings, QUICK)
        assert figure.of_ceiling == pytest.approx(row.rate / best.rate)


@pytest.mark.parametrize(("copy", "bound"), [(1e9, "bytes"), (1e15, "flops")])
def test_the_share_is_of_the_rate_that_allows_the_longer_time(copy: float, bound: str) -> None:
    """Seen: attention to the text, which moves more than it computes, as a share of FLOP/s."""
    case = replace(CASES["text attention"], implementations=("reference",))
    ceilings = replace(CEILINGS, copy=replace(CEILINGS.copy, rate=copy))
    ((row, figure),) = module.measure(case, CPU, ceilings, QUICK)
    assert row.bound == bound
    assert row.rate == getattr(figure, bound) / figure.median
    least = max(figure.bytes / copy, figure.flops / CEILINGS.attention.rate)
    assert figure.of_ceiling == pytest.approx(least / figure.median)


@pytest.mark.parametrize("signal", [KeyboardInterrupt(), Terminated(15)])
def test_operations_before_a_signal_are_kept_and_it_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, signal: BaseException
) -> None:
    """Seen: SIGTERM lost them, and after Ctrl-C the exit code was 0."""
    whole, names = module.measure, []

    def measured(case: Case, *rest: Any) -> list[module.Measured]:
        if names:
            raise signal
        names.append(case.name)
        return whole(case, *rest)

    with pytest.raises((Terminated, click.Abort)):  # click's word for Ctrl-C
        run(monkeypatch, tmp_path / "r.json", measured, standalone_mode=False)
    result = read_result(tmp_path / "r.json")
    assert [row.figure.split("/")[0] for row in result.kernels] == names
    assert result.skipped[-1].reason == "interrupted"


def test_name_that_no_operation_has_is_refused(tmp_path: Path) -> None:
    ran = CliRunner().invoke(kernels, ["--sizes", "tiny", "--only", "soup"])
    assert isinstance(ran.exception, BadRequest)
    assert "gate_residual" in str(ran.exception)


def test_result_file(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--sizes", "tiny", "--only", "gate_residual", "--quick", "--out", str(out)]
    ran = CliRunner().invoke(kernels, arguments)
    assert ran.exit_code == 0, ran.output
    assert "gate_residual" in ran.output
    result = read_result(out)
    assert result.ceilings.gemm.rate > 0
    (row,), (figure,) = result.kernels, result.figures
    assert row.figure == figure.name
    assert len(figure.samples) == QUICK.rounds * QUICK.samples_per_round
    assert row.rate == pytest.approx(figure.bytes / figure.median)
    assert row.error_ratio == 1
    assert [part.part for part in result.skipped] == ["kernels on a GPU"]
