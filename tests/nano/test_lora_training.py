# SPDX-License-Identifier: Apache-2.0
"""A LoRA of the built-in model: it begins as nothing, and its file merges to what was trained."""

from __future__ import annotations

from pathlib import Path

import torch

from pw_export.nano.scenes import BACKGROUNDS, draw_scene, render
from pw_export.nano.train_draft import DIT, initial_dit
from pw_export.nano.train_lora import LAYERS, POSTER, add_lora, lora_tensors
from pw_export.nano.trainable import velocities
from pw_runtime.checkpoint.lora import merged, read_loras
from pw_runtime.models import WanDiT
from pw_runtime.system.atomic_files import write_tensors
from pw_runtime.types import LoraFile
from tests.closeness import max_abs


def test_the_file_merges_to_the_network_that_was_trained(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = initial_dit(DIT, generator)
    for weight in weights.values():
        weight += 0.02 * torch.randn(weight.shape, generator=generator)
    plain, trained = WanDiT(DIT).requires_grad_(False), WanDiT(DIT)
    for net in (plain, trained):
        net.load_state_dict(weights)
    added = add_lora(trained, seed=1)
    inputs = (torch.randn(1, 48, 2, 4, 4), torch.tensor([700.0]), torch.randn(1, 32, 64))
    before = velocities(plain, *inputs)
    assert torch.equal(velocities(trained, *inputs), before)
    assert {name for name, x in trained.named_parameters() if x.requires_grad} == {
        f"{name}.parametrizations.weight.0.{part}"
        for name, _ in plain.named_modules()
        if LAYERS.fullmatch(name)
        for part in ("down", "up")
    }

    with torch.no_grad():
        for product in added.values():
            product.up.normal_(std=0.05, generator=generator)  # type: ignore[union-attr, operator]
            for x in product.parameters():
                x.copy_(x.half())
    after = velocities(trained, *inputs).detach()
    assert max_abs(after, before) > 0.01
    path = tmp_path / "lora.safetensors"
    write_tensors(path, lora_tensors(trained, added.state_dict()))
    (lora,) = read_loras({"draft": [LoraFile(path)]}, {"draft": DIT})["draft"]
    plain.load_state_dict({name: merged([lora], name, x) for name, x in weights.items()})
    assert max_abs(velocities(plain, *inputs), after) < 1e-5


def test_a_poster_shows_the_shape_of_the_scene_before_paper_and_ink() -> None:
    scene = draw_scene(2)
    plain, poster = render(scene, 64, 32, 5), render(scene, 64, 32, 5, landscape=POSTER)
    middle = (slice(None), 2, 16, 32)
    assert torch.equal(plain[middle], poster[middle])  # of the shape
    top, bottom = poster[:, 0, 0, 0], poster[:, 0, -1, 0]
    assert top.min() > 0.7
    assert bottom.max() < -0.8
    own = render(scene, 64, 32, 5, landscape=BACKGROUNDS[scene.background])
    assert torch.equal(own, plain)
