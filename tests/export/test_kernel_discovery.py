# SPDX-License-Identifier: Apache-2.0
"""The library of compiled kernels contains what the networks launch."""

from __future__ import annotations

import pytest
import torch

from pw_export import kernel_library
from pw_export.kernel_discovery import variants_for
from pw_export.kernel_library import jobs_for
from pw_kernels import attention
from pw_kernels.dispatch_anywhere import dispatch_anywhere
from pw_kernels.launcher import recording
from pw_kernels.op import OPS, using
from pw_kernels.variant import Variant


@pytest.fixture(scope="module")
def hopper() -> dict[str, Variant]:
    return variants_for((9, 0))


@pytest.mark.slow
def test_every_operation_with_a_kernel_is_launched_by_the_networks(
    hopper: dict[str, Variant],
) -> None:
    launched = {variant.kernel for variant in hopper.values()}
    attention = {"attention_hopper", "attention_gluon", "attention_portable"}
    attention |= {"sparse_attention_hopper"}
    assert attention <= launched
    others = {name for name, op in OPS.items() if op.launch and "attention" not in name}
    assert {name.removesuffix("_add") for name in others} == launched - attention


@pytest.mark.slow
def test_one_piece_of_code_serves_every_resolution(hopper: dict[str, Variant]) -> None:
    """The transformer has as many variants as there are kinds of calls, not sizes of clips."""
    counts: dict[str, int] = {}
    for variant in hopper.values():
        counts[variant.kernel] = counts.get(variant.kernel, 0) + 1
    assert counts["qk_norm_rope"] == counts["attention_hopper"] == counts["gate_residual"] == 1
    assert counts["gate_residual_norm"] == 2  # affine after attention, modulated after the text
    assert counts["norm_modulate"] == 3  # bf16 into block 0, fp32 into others, into the fp32 head


def test_all_gpus_that_run_an_architecture_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: 8.6 runs code for sm_80, but in smaller tiles than 8.0, which alone were compiled."""

    def variants_of_attention(gpu: tuple[int, int]) -> dict[str, Variant]:
        x = torch.empty(256, 2, 128, device="meta", dtype=torch.bfloat16)
        with recording(gpu) as variants, using("triton"), dispatch_anywhere():
            attention(x, x, x)
        return variants

    monkeypatch.setattr(kernel_library, "variants_for", variants_of_attention)
    jobs = jobs_for([80], ["attention_portable"])
    tiles = {dict(job.variant.constants)["BLOCK_N"] for job in jobs}
    assert tiles == {64, 32}
