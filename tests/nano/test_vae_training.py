# SPDX-License-Identifier: Apache-2.0
"""What the error of a decoded clip wants: the clip itself, and edges as steep as its own."""

from __future__ import annotations

import torch
from torch import Tensor

from pw_export.nano.train_vae import edge_strength, picture_loss


def edge(width: int) -> Tensor:
    """A clip [1, 3, 2, 16, 32] that is dark on the left, bright on the right of a ramp."""
    ramp = ((torch.arange(32) - 15.5) / width + 0.5).clamp(0, 1) * 2 - 1
    return ramp.expand(1, 3, 2, 16, 32).clone()


def test_a_clip_that_is_right_has_no_loss() -> None:
    assert picture_loss(edge(2), edge(2)) == 0


def test_of_two_blurs_the_steeper_costs_less() -> None:
    losses = [float(picture_loss(edge(width), edge(2))) for width in (3, 4, 6)]
    assert losses == sorted(losses)


def test_edges_too_steep_cost_as_well() -> None:
    assert picture_loss(edge(1), edge(2)) > 0


def test_the_strength_of_edges_does_not_tell_where_in_a_square_they_are() -> None:
    moved = edge_strength(edge(2).roll(2, dims=-1)[..., 4:28])
    assert moved.shape == (2, 3, 2, 3)
    torch.testing.assert_close(moved, edge_strength(edge(2)[..., 4:28]))
