# SPDX-License-Identifier: Apache-2.0
"""The kernel bench where there is no GPU: it checks and reports; times mean nothing here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pw_bench.cases_decoder import decoder_cases
from pw_bench.cases_transformer import transformer_cases
from pw_bench.kernel_cases import Maker
from pw_bench.kernels import check, main
from pw_bench.timing import QUICK, Timing, time_all
from pw_kernels.interpreter import install_exact_casts

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


def test_result_file(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--sizes", "tiny", "--only", "gate_residual", "--quick", "--out", str(out)]
    ran = CliRunner().invoke(main, arguments)
    assert ran.exit_code == 0, ran.output
    assert "gate_residual" in ran.output
    result = json.loads(out.read_text())
    assert result["ceilings"]["gemm"]["rate"] > 0
    (row,) = result["rows"]
    assert len(row["timing"]["samples"]) == QUICK.rounds * QUICK.samples_per_round
    assert row["median_ms"] > 0
    assert row["error_ratio"] == 1


def test_candidates_take_turns() -> None:
    order: list[str] = []
    candidates = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = time_all(candidates, CPU, QUICK)
    assert order == ["a", "b", "a", "b", "a", "b"]  # once to warm up, then two rounds
    assert all(len(timing.samples) == 2 for timing in timings.values())


def test_what_counts_as_stable() -> None:
    assert Timing(samples=(1.0, 1.01, 1.02, 0.99)).stable
    assert not Timing(samples=(1.0, 1.5, 1.0, 0.8)).stable
    assert Timing(samples=(3.0, 1.0, 2.0)).median == 2.0
