# SPDX-License-Identifier: Apache-2.0
"""Schedules and solvers against trajectories of the official samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pw_runtime.sampling.schedule import even_step, make_schedule, time_input
from pw_runtime.sampling.solver import sample
from tests.oracle import golden
from tests.tolerance import assert_as_accurate

RUNS: dict[str, Any] = golden.load_json("samplers")["runs"]


def toy_velocity(x: Tensor, t: int) -> Tensor:
    """The velocity field that the golden trajectories were made with."""
    wave = 0.5 * torch.sin(x + 4 * t / 1000)
    return 0.7 * x - 0.9 * torch.tanh(1.3 * x) + wave - 0.2 * t / 1000


def trajectory(
    run: dict[str, Any], *, bf16_einsum: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    schedule = make_schedule(run["kind"], run["steps"], run["shift"])
    latents: list[Tensor] = []

    def velocities(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        latents.append(x)
        v = toy_velocity(x, schedule.timesteps[step])
        return v, v

    noise = golden.load("samplers")["noise"].to(dtype)
    last = sample(velocities, noise, schedule.sigmas, run["kind"], 1.0, bf16_einsum=bf16_einsum)
    return [*latents, last]


@pytest.mark.parametrize("name", RUNS)
def test_schedule_equals_official(name) -> None:
    run = RUNS[name]
    schedule = make_schedule(run["kind"], run["steps"], run["shift"])
    assert list(schedule.sigmas) == run["sigmas"]
    assert list(schedule.timesteps) == run["timesteps"]
    assert list(schedule.step_sizes) == run["dt_quantized"]


@pytest.mark.parametrize("name", RUNS)
def test_trajectory_equals_official(name) -> None:
    run = RUNS[name]
    latents, exact = trajectory(run), trajectory(run, dtype=torch.float64)
    steps = range(len(latents)) if run["x_index"] == "all" else run["x_index"]
    for official, step in zip(golden.load("samplers")[f"{name}_x"], steps, strict=True):
        assert_as_accurate(latents[step], official, exact[step])


@pytest.mark.parametrize("name", [name for name in RUNS if RUNS[name]["kind"] == "unipc"])
def test_bf16_einsum_switch_reproduces_the_autocast_quirk(name) -> None:
    """Nearly every value is reproduced; the rest differ by a flipped bf16 rounding.

    A difference of one fp32 ulp flips it with a chance of 2^-16. Here it is up to 6 ulp in each of
    50 steps: half a value in a hundred.
    """
    wanted = golden.load("samplers")[f"{name}_bf16einsum_final"]
    error = (trajectory(RUNS[name], bf16_einsum=True)[-1] - wanted).abs()
    assert (error > 1e-5).float().mean() <= 1e-2
    plain = (trajectory(RUNS[name])[-1] - wanted).abs()
    assert error.mean() <= plain.mean() / 20


def test_bf16_einsum_is_no_quirk_of_dpm() -> None:
    run = next(run for run in RUNS.values() if run["kind"] == "dpm++")
    assert torch.equal(trajectory(run, bf16_einsum=True)[-1], trajectory(run)[-1])


def test_a_single_step_returns_the_data_prediction() -> None:
    schedule = make_schedule("unipc", 1, 5.0)
    noise = torch.ones(1, 1, 1, 1)
    x = sample(lambda x, step: (0.5 * x, 0.3 * x), noise, schedule.sigmas, "unipc", 2.0)
    assert x.item() == pytest.approx(1 - 0.7 * schedule.sigmas[0])


def test_step_sizes_are_even_and_positive() -> None:
    assert [even_step(dt) for dt in (57, 96, 1, 0, -5)] == [56, 96, 2, 2, 4]


def test_rounded_time_input_equals_official_multi_gpu_values() -> None:
    """Section 1.6 (b) of the model specification, 2K preset."""
    schedule = make_schedule("unipc", 4, 5.5)
    device = torch.device("cpu")
    rounded = [time_input(t, device, rounded=True).item() for t in schedule.timesteps]
    assert rounded == [1000, 944, 844, 648]
    assert time_input(999, device).item() == 999
