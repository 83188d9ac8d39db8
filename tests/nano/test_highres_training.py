# SPDX-License-Identifier: Apache-2.0
"""The high-res network begins as the draft network and learns what a long step would do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pw_export.nano import train_highres
from pw_export.nano.scenes import SHAPES, draw_scene
from pw_export.nano.train_draft import DIT, initial_dit
from pw_export.nano.train_highres import (
    ASTRAY,
    MISTAKEN,
    MISTAKES,
    draft_kinds,
    initial_highres,
    jump_targets,
    on_token_grid,
    shortcut_loss,
)
from pw_export.nano.trainable import velocities
from pw_runtime.models import WanDiT
from pw_runtime.stages.condition import resize_draft
from pw_runtime.types import Latent, StageConfig
from tests.closeness import max_abs


def test_drafts_are_resized_as_the_runtime_does() -> None:
    drafts = torch.randn(2, 48, 3, 4, 8)
    plan = StageConfig(width=512, height=256, steps=4, shift=5.5, guidance=1.0)
    resized = on_token_grid(drafts, (plan.width, plan.height))
    for draft, seen in zip(drafts, resized, strict=True):
        assert torch.equal(seen, resize_draft(Latent(x=draft), plan).x)


def test_kinds_of_drafts_have_their_shares() -> None:
    scenes = [draw_scene(number) for number in range(300)]
    own = torch.tensor([SHAPES.index(scene.shape) for scene in scenes])
    kinds = draft_kinds(scenes, torch.Generator().manual_seed(0))
    right = 1 - MISTAKEN - ASTRAY * (1 - 1 / len(SHAPES))  # of any shape, a third has this one
    assert abs((kinds == own).float().mean() - right) < 0.07
    assert abs((kinds >= len(SHAPES)).float().mean() - MISTAKEN) < 0.07
    assert set(kinds.tolist()) == set(range(len(SHAPES) + MISTAKES))


def test_the_first_high_res_network_predicts_what_the_draft_network_does() -> None:
    generator = torch.Generator().manual_seed(0)
    draft = WanDiT(DIT).requires_grad_(False)
    weights = initial_dit(DIT, generator)
    for weight in weights.values():
        weight += 0.02 * torch.randn(weight.shape, generator=generator)
    draft.load_state_dict(weights)
    highres = initial_highres(weights).requires_grad_(False)
    latents, texts = torch.randn(1, 48, 2, 4, 4), torch.randn(1, 32, 64)
    t, dt, drafts = torch.tensor([700.0]), torch.tensor([100.0]), torch.randn(1, 48, 2, 2, 2)
    expected = velocities(draft, latents, t, texts)
    assert expected.std() > 0.01
    assert max_abs(velocities(highres, latents, t, texts, dt, drafts), expected) < 1e-5


def test_a_jump_is_the_mean_of_two_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float, float]] = []

    def field(net: object, x: Tensor, t: Tensor, texts: Tensor, dt: Tensor, seen: Tensor) -> Tensor:
        asked.append((x.mean().item(), t.item(), dt.item()))
        return torch.full_like(x, len(asked))

    monkeypatch.setattr(train_highres, "velocities", field)
    x, t, dt, unseen = torch.zeros(1, 1, 1, 2, 2), *torch.tensor([[800.0], [400.0]]), torch.zeros(0)
    target = jump_targets(None, x, t, dt, unseen, unseen)  # type: ignore[arg-type]
    assert torch.equal(target, torch.full_like(x, 1.5))
    assert asked == [(0.0, 800.0, 2.0), (pytest.approx(-0.2), 600.0, 2.0)]


def test_a_network_that_is_right_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one clip and fixed noise, the straight line is the true velocity."""
    clean = torch.randn(1, 2, 1, 2, 2).expand(16, -1, -1, -1, -1)

    def straight(
        net: object, x: Tensor, t: Tensor, texts: Tensor, dt: Tensor, seen: Tensor
    ) -> Tensor:
        return (x - clean[0]) / (t / 1000).view(-1, 1, 1, 1, 1)

    monkeypatch.setattr(train_highres, "velocities", straight)
    generator, texts = torch.Generator().manual_seed(0), torch.zeros(16, 1)
    loss = shortcut_loss(None, clean, texts, texts, 5.0, generator)  # type: ignore[arg-type]
    assert loss.item() < 1e-6
    monkeypatch.setattr(train_highres, "velocities", lambda *given: straight(*given) + 1.0)
    loss = shortcut_loss(None, clean, texts, texts, 5.0, generator)  # type: ignore[arg-type]
    assert loss.item() > 0.1
