# SPDX-License-Identifier: Apache-2.0
"""The step cache: which steps it leaves out, and what it puts in their place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from pw_runtime.errors import BadRequest
from pw_runtime.sampling.denoise import denoise
from pw_runtime.sampling.schedule import make_schedule
from pw_runtime.sampling.solver import sample
from pw_runtime.sampling.step_cache import FEWEST_STEPS, StepCache, require_cacheable
from pw_runtime.types import Compat, StageConfig, TextContext
from tests.closeness import relative_l2
from tests.sampling.test_guidance import Field

STEPS, GUIDANCE = 40, 5.0
SIGMAS = make_schedule("unipc", STEPS, 5.0).sigmas
NOISE = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def of_sigma(slope: float) -> Callable[[Tensor, int], list[Tensor]]:
    """A velocity that is a straight line in the noise level."""

    def velocities(x: Tensor, step: int) -> list[Tensor]:
        return [torch.ones_like(x) * (1 + slope * SIGMAS[step])]

    return velocities


def smooth(x: Tensor, step: int) -> list[Tensor]:
    """Both passes of a velocity that depends on the latent and the noise level."""
    cond = 0.7 * x - 0.9 * torch.tanh(1.3 * x) + 0.4 * SIGMAS[step]
    return [cond, cond - 0.1 * torch.sin(x)]


def cached(
    velocities: Callable[[Tensor, int], list[Tensor]], threshold: float
) -> tuple[Tensor, list[int], StepCache]:
    """Return the result, the steps that were computed, and the cache."""
    computed: list[int] = []

    def counted(x: Tensor, step: int) -> list[Tensor]:
        computed.append(step)
        return velocities(x, step)

    cache = StepCache(counted, SIGMAS, GUIDANCE, threshold, lambda: None)
    return sample(cache.velocities, NOISE, SIGMAS, "unipc", GUIDANCE), computed, cache


def test_a_threshold_that_nothing_is_below_changes_no_bit() -> None:
    exact = sample(smooth, NOISE, SIGMAS, "unipc", GUIDANCE)
    latent, computed, cache = cached(smooth, 1e-12)
    assert computed == list(range(STEPS))
    assert cache.skipped == 0
    assert torch.equal(latent, exact)


def test_the_first_two_steps_and_the_last_are_always_computed() -> None:
    _, computed, cache = cached(smooth, 0.999)
    assert computed[:2] == [0, 1]
    assert computed[-1] == STEPS - 1
    assert cache.skipped == STEPS - len(computed) > STEPS / 2


def test_a_velocity_on_a_straight_line_is_extrapolated_to_itself() -> None:
    velocities = of_sigma(0.5)
    latent, computed, _ = cached(velocities, 0.999)
    assert computed == [0, 1, STEPS - 1]
    exact = sample(velocities, NOISE, SIGMAS, "unipc", GUIDANCE)
    # fp32 differences of two neighbours, extended over the whole schedule
    share = SIGMAS[1] / (SIGMAS[0] - SIGMAS[1])
    assert (latent - exact).abs().max() < 8 * share * torch.finfo(torch.float32).eps


def test_more_is_left_out_and_lost_with_a_higher_threshold() -> None:
    exact = sample(smooth, NOISE, SIGMAS, "unipc", GUIDANCE)
    skipped, errors = [], []
    for threshold in (0.02, 0.1, 0.4):
        latent, _, cache = cached(smooth, threshold)
        skipped.append(cache.skipped)
        errors.append(relative_l2(latent, exact))
    assert skipped == sorted(set(skipped))
    assert errors == sorted(set(errors))
    assert errors[0] < 0.01


def test_a_velocity_that_jumps_is_computed_again_until_it_is_smooth() -> None:
    def jumping(x: Tensor, step: int) -> list[Tensor]:
        sign = 1 if step < STEPS // 2 else -3
        return [torch.full_like(x, float(sign))]

    _, computed, _ = cached(jumping, 0.01)
    # A constant is not computed again: the jump is seen where it ends, in the last step.
    assert computed == [0, 1, STEPS - 1]

    def alternating(x: Tensor, step: int) -> list[Tensor]:
        return [torch.full_like(x, float((-1) ** step))]

    _, computed, cache = cached(alternating, 0.01)
    assert computed == list(range(STEPS))
    assert cache.skipped == 0


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_velocities_without_a_relative_change_are_computed(value: float) -> None:
    cache = StepCache(
        lambda x, step: [torch.full_like(x, value)], SIGMAS, GUIDANCE, 0.5, lambda: None
    )
    for step in range(STEPS):
        cache.velocities(NOISE, step)
    assert cache.skipped == 0


def test_a_step_left_out_runs_no_pass_and_counts_as_done() -> None:
    net, done, told = Field(), [], []
    stage = StageConfig(width=64, height=64, steps=STEPS, shift=5.0, guidance=3.0)
    text = TextContext(cond=torch.full((3, 2), 0.3), uncond=torch.full((3, 2), -0.2))
    net.text_keys_values = lambda context: context  # type: ignore[method-assign]
    net.velocities = (  # type: ignore[method-assign]
        lambda latent, texts, *rest: [_count(net, latent + text.mean()) for text in texts]
    )
    denoise(net, text, NOISE, stage, Compat(), done.append, step_cache=0.5, notice=told.append)
    left_out = STEPS - net.passes // 2
    assert left_out > 0
    assert done == [1] * left_out
    assert told == [f"{left_out} of {STEPS} steps extrapolated, --step-cache 0.5"]


def _count(net: Field, v: Tensor) -> Tensor:
    net.passes += 1
    return v


@pytest.mark.parametrize(
    ("threshold", "steps", "what"),
    [
        (0.0, 50, "is a relative change"),
        (1.0, 50, "is a relative change"),
        (-0.1, 50, "is a relative change"),
        (float("nan"), 50, "is a relative change"),
        (float("inf"), 50, "is a relative change"),
        (0.1, FEWEST_STEPS - 1, "needs a draft of many small steps"),
    ],
)
def test_thresholds_and_drafts_without_meaning_are_refused(threshold, steps, what) -> None:
    stage = StageConfig(width=64, height=64, steps=steps, shift=5.0, guidance=3.0)
    with pytest.raises(BadRequest, match=what):
        require_cacheable(stage, threshold)


def test_no_cache_and_enough_steps_are_accepted() -> None:
    accepted = []
    for steps, threshold in ((1, None), (FEWEST_STEPS - 1, 0.1), (FEWEST_STEPS, 0.1)):
        stage = StageConfig(width=64, height=64, steps=steps, shift=5.0, guidance=3.0)
        with suppress(BadRequest):
            require_cacheable(stage, threshold)
            accepted.append(steps)
    assert accepted == [1, FEWEST_STEPS]
