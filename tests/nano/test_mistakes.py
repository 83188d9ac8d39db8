# SPDX-License-Identifier: Apache-2.0
"""Drafts that are wrong on purpose keep what the high-res network needs to put them right."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from pw_export.nano.mistakes import ALIKE, mistaken
from pw_export.nano.scenes import SQUARE, TALL, WIDE, Scene, draw_scene, render


def wrong_drafts(*, pairs: bool) -> list[tuple[Scene, Scene]]:
    """Pairs of a scene and a mistaken draft of it, of all aspects."""
    draw = random.Random(0)
    scenes = [draw_scene(n, varied=True, aspect=(WIDE, SQUARE, TALL)[n % 3]) for n in range(600)]
    return [(s, mistaken(s, draw)) for s in scenes if (s.other is not None) is pairs]


def test_the_right_one_of_two_is_the_larger_or_of_two_alike_the_left_one() -> None:
    twice = [(s, m, m.other) for s, m in wrong_drafts(pairs=False) if m.other is not None]
    assert len(twice) > 200
    for scene, draft, ghost in twice:
        assert replace(draft, other=None, stretch=1.0, growth=0.0) == scene
        assert (ghost.colour, ghost.shape, ghost.dy) == (scene.colour, scene.shape, scene.dy)
        assert 0 < ghost.x < scene.width
        assert ghost.radius < scene.radius * (ALIKE if ghost.x < scene.x else 1.0)


def test_two_shapes_stay_two_where_they_are() -> None:
    pairs = wrong_drafts(pairs=True)
    assert len(pairs) > 50
    for scene, draft in pairs:
        assert scene.other is not None
        assert draft.other is not None
        for right, wrong in ((scene, draft), (scene.other, draft.other)):
            kept = replace(wrong, shape=right.shape, stretch=1.0, other=right.other)
            assert kept == right
    assert any(draft.shape != scene.shape for scene, draft in pairs)


def test_a_growing_shape_has_its_size_at_half_time() -> None:
    still = replace(draw_scene(0), motion="left", dx=0.0, dy=0.0, camera="still")
    plain, growing = (
        (
            render(replace(still, growth=growth), 256, 128, 3)
            - render(replace(still, radius=1e-3), 256, 128, 3)
        )
        .abs()
        .sum(0)
        .gt(0.2)
        .sum((1, 2))
        for growth in (0.0, 0.4)
    )
    assert plain[1] == growing[1]
    ratio = growing[[0, 2]] / plain[[0, 2]]
    assert torch.allclose(ratio.sqrt(), torch.tensor([0.8, 1.2]), atol=0.03)


def test_a_stretched_shape_is_wider_and_as_large() -> None:
    scene = replace(draw_scene(0), shape="square", motion="left", dx=0.0, dy=0.0, camera="still")
    plain, wide = (
        (
            render(replace(scene, stretch=s), 256, 128, 1)
            - render(replace(scene, radius=1e-3), 256, 128, 1)
        )
        .abs()
        .sum(0)[0]
        .gt(0.2)
        for s in (1.0, 1.35)
    )
    assert abs(wide.sum() / plain.sum() - 1) < 0.05
    ratio = torch.tensor([mask.any(0).sum() / mask.any(1).sum() for mask in (plain, wide)])
    assert torch.allclose(ratio, torch.tensor([1.0, 1.35]), atol=0.06)
