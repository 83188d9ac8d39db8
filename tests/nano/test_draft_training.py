# SPDX-License-Identifier: Apache-2.0
"""The draft network learns clips of every aspect, some of which begin with a given picture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pw_export.nano import train_draft
from pw_export.nano.train_draft import DIT, TEXT_ENCODER, TextToLatent, flow_loss, named
from pw_export.nano.training import adopt
from pw_export.nano.weights import TRAINED, read_weights

Net = Callable[..., Tensor]


def loss_of(net: Net, clean: Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(train_draft, "velocities", net)
    generator = torch.Generator().manual_seed(0)
    return flow_loss(None, clean, torch.zeros(0), generator).item()  # type: ignore[arg-type]


def test_a_network_that_is_right_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = torch.randn(1, 2, 3, 2, 2).expand(16, -1, -1, -1, -1)
    given = []

    def straight(net: object, x: Tensor, t: Tensor, texts: Tensor) -> Tensor:
        first = t[:, 0] == 0
        given.append(int(first.sum()))
        assert torch.equal(x[first, :, 0], clean[first, :, 0])  # the picture has no noise
        assert (t[:, 1:] > 0).all()
        velocity = (x - clean) / (t / 1000)[:, None, :, None, None]
        return velocity.nan_to_num(nan=9.0)  # of given frames: it must not count

    assert loss_of(straight, clean, monkeypatch) < 1e-6
    assert 0 < given[0] < 8
    assert loss_of(lambda *x: straight(*x) + 1.0, clean, monkeypatch) == pytest.approx(1, abs=1e-3)


def test_training_can_begin_with_the_weights_in_the_package() -> None:
    model, known = TextToLatent(DIT, TEXT_ENCODER), read_weights(TRAINED)
    adopt(model, named(model, known))
    assert torch.equal(model.dit.state_dict()["head.head.weight"], known.draft["head.head.weight"])
    table = known.text_encoder["token_embedding.weight"]
    assert torch.equal(model.text.state_dict()["shared.weight"][: len(table)], table)
