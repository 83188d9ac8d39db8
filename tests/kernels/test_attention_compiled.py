# SPDX-License-Identifier: Apache-2.0
"""Portable and Hopper attention kernels, exact and sparse, compiled for every architecture."""

from __future__ import annotations

import pytest

from tests.kernels.compiling import Report, architectures, assert_resources, reports_of

# By the first two digits of the architecture; everything else has the instructions of Ampere.
TENSOR_CORES = {9: "wgmma.mma_async.", 10: "tcgen05.mma.", 11: "tcgen05.mma."}
AMPERE = "mma.sync.aligned.m16n8k16."


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    reports = reports_of(tmp_path_factory, "compile_attention")
    return [report for report in reports if "instructions" in report]


def uses(report: Report, instruction: str) -> bool:
    return any(name.startswith(instruction) for name in report["instructions"])


@pytest.mark.slow
def test_tensor_cores_are_used_and_nothing_spills(reports: list[Report]) -> None:
    assert {report["arch"] for report in reports} == set(architectures())
    for report in reports:
        assert_resources(report)
        assert uses(report, TENSOR_CORES.get(report["arch"] // 10, AMPERE)), report


@pytest.mark.slow
@pytest.mark.parametrize("kind", [False, "sparse"])
def test_hopper_kernel_is_warp_specialised(reports: list[Report], kind: object) -> None:
    """A producer and two consumer warpgroups: 12 warps of the 4 requested; TMA in and out."""
    (report,) = (r for r in reports if (r["arch"], r["case"]) == (90, [128, "bf16", kind]))
    assert report["warps"] == 12
    assert uses(report, "setmaxnreg.")
    assert uses(report, "cp.async.bulk.tensor.2d.shared::")
    assert uses(report, "cp.async.bulk.tensor.2d.global.shared::cta")
