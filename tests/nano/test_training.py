# SPDX-License-Identifier: Apache-2.0
"""The training loop learns, logs, and continues where it was stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pw_export.nano import training
from pw_export.nano.optimizer import orthogonal
from pw_export.nano.pca import blocks, fit_pca, pixels
from pw_export.nano.scenes import draw_scene, render
from pw_export.nano.training import Recipe, adopt, is_complete, train

RECIPE = Recipe(steps=60, matrix_lr=0.2, other_lr=0.05, warmup=5, ema=0.9)


class Line(nn.Module):
    """A matrix trained by Muon and a bias trained by AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        nn.init.zeros_(self.blocks[0].weight)
        nn.init.zeros_(self.blocks[0].bias)

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(32, 4, generator=generator)
        return (self.blocks[0](x) - (x.flip(1) + 0.5)).square().mean()


def test_a_training_that_was_stopped_goes_on_as_if_it_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    line = Line()
    expected = train(whole, "line", line, line.loss, RECIPE)
    line = Line()

    def stopped(step: int, generator: torch.Generator) -> Tensor:
        monkeypatch.setattr(training, "SAVE_EVERY", 0.0 if step < 30 else 60.0)
        if step == 45:
            raise KeyboardInterrupt
        return line.loss(step, generator)

    with pytest.raises(KeyboardInterrupt):
        train(parts, "line", line, stopped, RECIPE)
    assert torch.load(parts / "line.pt", weights_only=True)["step"] == 30
    assert not is_complete(parts, "line")
    with pytest.raises(ValueError, match="60 steps, not of 61"):
        train(parts, "line", line, line.loss, replace(RECIPE, steps=61))
    line = Line()
    result = train(parts, "line", line, line.loss, RECIPE)
    for name, weight in expected.items():
        assert torch.equal(result[name], weight)
    assert is_complete(parts, "line")
    log = [json.loads(text) for text in (whole / "line.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [20, 40, 60]
    assert log[-1]["loss"] < 0.2 * log[0]["loss"]


def test_rates_warm_up_and_fall_to_nothing() -> None:
    recipe = Recipe(steps=100, other_lr=1.0, warmup=10, decay=0.5)
    assert recipe.rate(0) == pytest.approx(0.1)
    assert recipe.rate(40) == 1.0
    assert recipe.rate(75) == pytest.approx(0.5)
    assert recipe.rate(99) == pytest.approx(0.02)


def test_an_orthogonal_update_has_singular_values_near_one() -> None:
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))
    for batch in (x, x.mT):
        values = torch.linalg.svdvals(orthogonal(batch))
        assert 0.6 < values.min() < values.max() < 1.3


def test_blocks_of_pixels_come_back_and_few_components_keep_most_of_a_scene() -> None:
    clips = [render(draw_scene(number), 64, 32, 9) for number in range(8)]
    assert torch.equal(pixels(blocks(clips[0])), clips[0])
    pca = fit_pca(clips)
    latent = pca.encode(clips[0])
    assert latent.shape == (48, 3, 2, 4)
    assert (pca.decode(latent) - clips[0]).square().mean() < 0.01
    assert torch.stack([pca.encode(clip) for clip in clips]).square().mean() < 2


def test_known_weights_replace_random_ones_and_a_longer_table_keeps_its_new_rows() -> None:
    table = nn.Embedding(5, 2)
    new = table.weight[3:].detach().clone()
    adopt(table, {"weight": torch.ones(3, 2)})
    assert torch.equal(table.weight[:3], torch.ones(3, 2))
    assert torch.equal(table.weight[3:], new)
    with pytest.raises(ValueError, match=r"weight is \[5, 2\], known: \[3, 4\]"):
        adopt(table, {"weight": torch.ones(3, 4)})
