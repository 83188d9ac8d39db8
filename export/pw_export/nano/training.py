# SPDX-License-Identifier: Apache-2.0
"""The loop that all training programs share: stops and goes on anywhere, logs as JSON lines.

A step draws everything random from a generator of its own number, so that a run that was stopped
and went on equals one that was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pw_export.nano.optimizer import make_optimizers
from pw_runtime.atomic import atomic_file

SAVE_EVERY = 60.0  # seconds
LOG_EVERY = 20  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long and how fast a network learns."""

    steps: int
    matrix_lr: float = 0.0  # of Muon
    other_lr: float  # of AdamW
    warmup: int = 50  # steps
    decay: float = 0.35  # last part of the steps, in which the rates fall to 0
    ema: float = 0.998
    seed: int = 0

    def rate(self, step: int) -> float:
        """Factor of the learning rates at a step."""
        falling = (self.steps - step) / (self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, max(falling, 0.0))


def train(
    folder: Path,
    name: str,
    modules: nn.Module,
    loss: Callable[[int, torch.Generator], Tensor],
    recipe: Recipe,
) -> dict[str, Tensor]:
    """Run the recipe's steps, from where an earlier call with the same folder and name stopped.

    Args:
        folder: where <name>.pt (the state, once a minute) and <name>.jsonl (the losses) lie.
        name: of this training.
        modules: what learns.
        loss: of a step's number and its generator.
        recipe: how long and how fast.

    Returns:
        Exponential moving average of the weights, by name.
    """
    optimizers = make_optimizers(modules, recipe.matrix_lr, recipe.other_lr)
    rates = [[group["lr"] for group in one.param_groups] for one in optimizers]
    average = {key: value.detach().clone() for key, value in modules.state_dict().items()}
    state_file, step, spent = folder / f"{name}.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        step, spent, average = state["step"], state["seconds"], state["average"]
        modules.load_state_dict(state["weights"])
        for one, saved in zip(optimizers, state["optimizers"], strict=True):
            one.load_state_dict(saved)
    parameters = [weight for weight in modules.parameters() if weight.requires_grad]
    mean, saved_at, began = 0.0, time.monotonic(), time.monotonic() - spent

    def save() -> None:
        state = {"step": step, "seconds": time.monotonic() - began, "average": average}
        state |= {"weights": modules.state_dict()}
        state |= {"optimizers": [one.state_dict() for one in optimizers]}
        with atomic_file(state_file) as partial:
            torch.save(state, partial)

    while step < recipe.steps:
        for one, at_full in zip(optimizers, rates, strict=True):
            for group, rate in zip(one.param_groups, at_full, strict=True):
                group["lr"] = rate * recipe.rate(step)
            one.zero_grad()
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        value = loss(step, generator)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for one in optimizers:
            one.step()
        step += 1
        keep = min(recipe.ema, step / (step + 10))
        with torch.no_grad():
            for key, weight in modules.state_dict().items():
                average[key].lerp_(weight, 1 - keep)
        mean += value.item() / LOG_EVERY
        if step % LOG_EVERY == 0:
            with (folder / f"{name}.jsonl").open("a") as log:
                seconds = round(time.monotonic() - began, 1)
                log.write(
                    json.dumps({"step": step, "loss": round(mean, 5), "seconds": seconds}) + "\n"
                )
            mean = 0.0
        if time.monotonic() - saved_at > SAVE_EVERY or step == recipe.steps:
            save()
            saved_at = time.monotonic()
    return average
