# SPDX-License-Identifier: Apache-2.0
"""Attention is chosen by measurement: the fastest that is right, the same one every time."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from pw_kernels.attention.trials import Trial, fastest, measure

CPU = torch.device("cpu")


def ran(name: str, seconds: float) -> Trial:
    return Trial(implementation=name, seconds=seconds, error=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trials", "chosen"),
    [
        ((ran("reference", 2.0), ran("triton", 1.0), ran("cudnn", 1.5)), "triton"),
        ((ran("reference", 2.0), ran("triton", 1.01), ran("cudnn", 1.0)), "triton"),
        ((ran("reference", 2.0), ran("triton", 1.03), ran("cudnn", 1.0)), "cudnn"),
        ((ran("reference", 2.0), Trial(implementation="triton", refused="no")), "reference"),
        ((), "reference"),
    ],
)
def test_the_fastest_is_chosen_and_the_first_of_those_about_as_fast(
    trials: tuple[Trial, ...], chosen: str
) -> None:
    assert fastest(trials) == chosen


def test_what_cannot_run_here_is_refused_with_its_reason_and_the_others_are_measured() -> None:
    trials = measure(
        CPU, tokens=40, heads=2, width=8, dtype=torch.float32,
        names=("reference", "triton"), timer=lambda run, device: 0.5,
    )  # fmt: skip
    reference, triton = trials
    assert reference.usable
    assert reference.seconds == 0.5
    assert reference.error is not None
    assert reference.error < 1e-6
    assert triton.refused == "pw::attention as triton needs a CUDA device, got cpu"
    assert fastest(trials) == "reference"


def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v[: len(q)] * 1.5


class Random:
    """Another result in every call, as of a race."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls += 1
        return q + self.calls


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (wrong, "its error is more than 1.25 times the reference's"),
        (Random(), "two calls with the same input differ"),
        (lambda q, k, v: q * float("nan"), "two calls with the same input differ"),
    ],
)
def test_a_wrong_result_is_never_chosen_however_fast(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], reason: str
) -> None:
    with (
        patch("pw_kernels.attention.LIBRARIES", {"cudnn": function}),
        patch("pw_kernels.attention.select", side_effect=_requested),
    ):
        trials = measure(
            CPU, tokens=40, heads=2, width=8, dtype=torch.float32,
            names=("reference", "cudnn"), timer=lambda run, device: 0.5,
        )  # fmt: skip
    assert trials[1].refused == reason
    assert fastest(trials) == "reference"


def _requested(name: str, device: torch.device) -> str:
    from pw_kernels import op

    return op._requested.get(name, "reference")


def test_no_more_implementations_are_measured_when_the_time_is_over() -> None:
    reference, cudnn = measure(
        CPU, tokens=40, heads=2, width=8, dtype=torch.float32, seconds=-1.0,
        names=("reference", "cudnn"), timer=lambda run, device: 0.5,
    )  # fmt: skip
    assert reference.usable
    assert cudnn.refused == "no time left to measure it"
