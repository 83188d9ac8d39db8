# SPDX-License-Identifier: Apache-2.0
"""The denoising loop with a first latent frame that is known, against the official composition."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from pw_engines.eager import EagerEngine
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.models import WanDiT, expected_shapes
from pw_runtime.sampling.denoise import denoise
from pw_runtime.sampling.loop_state import LoopState, NoLog
from pw_runtime.types import Compat, Conditioning, DitConfig, Solver, StageConfig, TextContext
from tests.closeness import max_abs
from tests.networks import TINY_DRAFT, TINY_HIGHRES
from tests.oracle import golden
from tests.oracle.image_to_video import denoise_from_picture
from tests.tolerance import ulp

SHAPE = (48, 3, 6, 8)  # 3 x 3 x 4 tokens
TOKENS = 36


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


NOISE, PICTURE = normal(*SHAPE), normal(48, 1, 6, 8, seed=1)
TEXT = TextContext(cond=normal(7, 64, seed=2), uncond=normal(4, 64, seed=3))
DRAFT = normal(48, 3, 3, 4, seed=4)


def stage(solver: Solver = "unipc", steps: int = 6) -> StageConfig:
    return StageConfig(width=128, height=96, steps=steps, shift=5.0, guidance=4.0, solver=solver)


def weights(config: DitConfig) -> dict[str, Tensor]:
    stored = golden.load("dit_tiny_weights")
    return {name: stored[name] for name in expected_shapes("draft", config)}


def segmented(config: DitConfig, limit: int = TOKENS) -> SegmentedDiT:
    with torch.device("meta"):
        net = WanDiT(config)
    net.load_state_dict(weights(config), assign=True)
    segments = segments_of(config, "fp32", limit)
    engines = {name: EagerEngine(part.spec, part.module) for name, part in segments.items()}
    return SegmentedDiT(net.requires_grad_(False), segments, engines)


def made(net: SegmentedDiT, plan: StageConfig, **options: object) -> Tensor:
    conditioning = Conditioning(x=DRAFT) if net.net.config.adapter_dim else None
    with torch.inference_mode():
        latent = denoise(
            *(net, TEXT, NOISE, plan, Compat(), lambda done: None, conditioning),
            fixed=PICTURE,
            **options,  # type: ignore[arg-type]
        )
    return latent.x


@pytest.mark.parametrize("config", [TINY_DRAFT, TINY_HIGHRES], ids=["draft", "highres"])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("limit", [TOKENS, 7], ids=["two calls", "seven calls"])
def test_the_loop_equals_the_official_composition(
    config: DitConfig, solver: Solver, limit: int
) -> None:
    plan = stage(solver)
    condition = DRAFT[None] if config.adapter_dim else None
    contexts = (TEXT.of("cond"), TEXT.of("uncond"))
    expected = denoise_from_picture(
        *(weights(config), asdict(config), plan, NOISE, PICTURE, contexts, condition)
    )
    got = made(segmented(config, limit), plan)
    assert torch.equal(got[:, :1], PICTURE)
    # The network errs by 16 ulp in fp32 (tests/models), and guidance multiplies that of each pass.
    assert max_abs(got, expected) <= 16 * (2 * plan.guidance - 1) * ulp(expected, torch.float32)


def test_the_noise_of_the_caller_is_left_as_it_was() -> None:
    before = NOISE.clone()
    made(segmented(TINY_DRAFT), stage(steps=2))
    assert torch.equal(NOISE, before)


def test_the_picture_changes_the_frames_after_it_and_the_noise_of_its_frame_does_not() -> None:
    net, plan = segmented(TINY_DRAFT), stage(steps=3)
    other = NOISE.clone()
    other[:, 0] = 7
    inputs = (TEXT, other, plan, Compat(), lambda done: None)
    with torch.inference_mode():
        same = denoise(net, *inputs, fixed=PICTURE).x
        without = denoise(net, TEXT, NOISE, *inputs[2:]).x
    got = made(net, plan)
    assert torch.equal(same, got)
    assert not torch.allclose(got[:, 1:], without[:, 1:], atol=1e-3)


class Kept(NoLog):
    """A log that has the state after a step, or is to go on from one."""

    def __init__(self, start: LoopState | None = None, at: int = 0) -> None:
        self.start, self.at, self.state = start, at, None

    def begin(self) -> LoopState | None:
        return self.start

    def keep(self, state: LoopState) -> None:
        if state.steps == self.at:
            self.state = state


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (TINY_DRAFT, {}),
        (TINY_DRAFT, {"step_cache": 0.5}),
        (TINY_HIGHRES, {"guidance_reuse": 2}),
    ],
    ids=["plain", "step cache", "guidance reuse"],
)
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_a_loop_that_goes_on_ends_with_the_same_bits(
    config: DitConfig, options: dict[str, object], solver: Solver
) -> None:
    net, plan = segmented(config), stage(solver, steps=9)
    for at in (1, 4):
        log = Kept(at=at)
        whole = made(net, plan, log=log, **options)
        assert log.state is not None
        resumed = made(net, plan, log=Kept(log.state), **options)
        assert torch.equal(resumed, whole)
        assert torch.equal(whole[:, :1], PICTURE)
