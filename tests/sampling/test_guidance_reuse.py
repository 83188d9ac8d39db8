# SPDX-License-Identifier: Apache-2.0
"""High-res steps without a negative pass: which passes run, and what is exact about it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pw_runtime.errors import BadRequest
from pw_runtime.sampling.denoise import denoise
from pw_runtime.sampling.guidance_reuse import GuidanceReuse, require_reusable
from pw_runtime.types import Compat, StageConfig, TextContext
from tests.sampling.test_guidance import Field

STAGE = StageConfig(width=64, height=64, steps=4, shift=5.5, guidance=5.0)
NOISE = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
TEXT = TextContext(cond=torch.full((3, 2), 0.3), uncond=torch.full((3, 2), -0.2))


class Passes(Field):
    """A transformer whose difference of the passes may depend on the latent; it lists them."""

    def __init__(self, *, constant: bool) -> None:
        super().__init__()
        self.constant, self.counts, self.texts = constant, [], []

    def velocities(self, latent, texts, modulation, layout, control, on_block) -> list[Tensor]:
        self.counts.append(len(texts))
        self.texts.append(texts)
        share = torch.ones_like(latent) if self.constant else torch.sin(latent)
        return [torch.tanh(latent) + share * text.sum() for text in texts]


def run(net: Passes, steps: int) -> tuple[Tensor, float]:
    done: list[float] = []
    latent = denoise(net, TEXT, NOISE, STAGE, Compat(), done.append, guidance_reuse=steps)
    return latent.x, sum(done)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_steps_after_the_first_run_the_pass_of_the_prompt_alone(steps: int) -> None:
    net = Passes(constant=False)
    run(net, steps)
    assert net.counts == [2, *[1] * steps, *[2] * (3 - steps)]
    # One object for each number of passes: a recorded step is replayed for the same texts alone.
    assert len({id(texts) for texts in net.texts}) == len(set(net.counts))


def test_a_skipped_pass_counts_as_progress() -> None:
    _, done = run(Passes(constant=False), 2)
    assert done == pytest.approx(2 * 0.5)  # Field reports no blocks of its own


def test_a_difference_that_does_not_change_gives_the_exact_latent() -> None:
    exact, _ = run(Passes(constant=True), 0)
    reused, _ = run(Passes(constant=True), 2)
    assert torch.allclose(reused, exact, rtol=0, atol=16 * torch.finfo(torch.float32).eps * 5)


def test_more_reuse_is_further_from_the_exact_latent() -> None:
    exact, _ = run(Passes(constant=False), 0)
    errors = [(run(Passes(constant=False), steps)[0] - exact).norm() for steps in (1, 2)]
    assert 0 < errors[0] < errors[1]


def test_the_difference_is_kept_no_longer_than_it_is_used() -> None:
    reuse = GuidanceReuse(lambda x, step, passes: [x * (step + 1)] * passes, 1)
    for step in range(3):
        reuse.velocities(NOISE, step)
    assert reuse._difference is None


@pytest.mark.parametrize(
    ("highres", "steps", "what"),
    [
        (None, 1, "needs a high-res stage with a negative pass"),
        (replace(STAGE, guidance=1.0), 1, "needs a high-res stage with a negative pass"),
        (STAGE, 3, "between the first and the last"),
        (STAGE, -1, "between the first and the last"),
        (replace(STAGE, steps=2), 1, "between the first and the last"),
    ],
)
def test_steps_that_have_nothing_to_reuse_are_refused(highres, steps, what) -> None:
    with pytest.raises(BadRequest, match=what):
        require_reusable(highres, steps)


def test_every_step_between_the_first_and_the_last_may_reuse() -> None:
    accepted = []
    for highres, steps in ((None, 0), *((STAGE, steps) for steps in range(STAGE.steps))):
        with suppress(BadRequest):
            require_reusable(highres, steps)
            accepted.append(steps)
    assert accepted == [0, *range(STAGE.steps - 1)]
