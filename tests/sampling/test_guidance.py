# SPDX-License-Identifier: Apache-2.0
"""The passes of a step by guidance: how many run, and that the latent stays the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pw_runtime.sampling.denoise import denoise
from pw_runtime.sampling.solver import sample
from pw_runtime.types import Compat, Pass, StageConfig, TextContext

STAGE = StageConfig(width=64, height=64, steps=5, shift=5.0, guidance=1.0)


class Field:
    """A transformer whose velocity depends on the latent and the text; it counts its passes."""

    def __init__(self) -> None:
        self.passes = 0

    def text_keys_values(self, context: Tensor) -> Tensor:
        return context.mean(0)

    def layout(self, noise: Tensor, clean: int) -> None:
        return None

    def modulation(self, t: Tensor, dt: Tensor | None) -> None:
        return None

    def velocities(self, latent, texts, modulation, layout, control, on_block) -> list[Tensor]:
        self.passes += len(texts)
        return [torch.tanh(latent * (1 + text.sum())) + text.sum() for text in texts]


def run(guidance: float, text: TextContext) -> tuple[Tensor, int]:
    net, noise = Field(), torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    net_latent = denoise(
        net, text, noise, replace(STAGE, guidance=guidance), Compat(), lambda part: None
    )
    return net_latent.x, net.passes


@pytest.mark.parametrize(("guidance", "name"), [(1.0, "cond"), (0.0, "uncond")])
def test_one_pass_is_enough_where_the_other_has_no_weight(guidance: float, name: Pass) -> None:
    """Bit for bit what a sampler makes of that pass's velocity alone."""
    text = TextContext(cond=torch.full((3, 2), 0.3), uncond=torch.full((3, 2), -0.2))
    alone = TextContext(cond=None, uncond=None)
    latent, passes = run(guidance, replace(alone, **{name: text.of(name)}))
    assert passes == STAGE.steps
    both, _ = run(guidance + 1e-7, text)
    assert torch.allclose(latent, both, atol=1e-5)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_guidance_0_is_bit_equal_to_two_passes_with_weight_0(solver) -> None:
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigmas = (1.0, 0.9, 0.7, 0.4, 0.0)
    cond, uncond = (lambda x: torch.tanh(x) + 0.3), (lambda x: torch.tanh(x) - 0.2)
    two = sample(lambda x, step: (cond(x), uncond(x)), noise, sigmas, solver, 0.0)
    one = sample(lambda x, step: (uncond(x),), noise, sigmas, solver, 0.0)
    assert torch.equal(two, one)


def test_a_pass_whose_text_was_not_encoded_is_an_error() -> None:
    with pytest.raises(ValueError, match="the text of the uncond pass was not encoded"):
        run(5.0, TextContext(cond=torch.zeros(3, 2), uncond=None))
