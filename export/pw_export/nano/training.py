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
from pw_runtime.system.atomic_files import atomic_file, write_text

Loss = Callable[[int, torch.Generator], Tensor]
"""Of a step's number and its generator."""

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


class Run:
    """A training under way: what learns, how far it is, and what it leaves on the disk."""

    def __init__(self, folder: Path, name: str, modules: nn.Module, recipe: Recipe) -> None:
        """Begin, or go on from what an earlier run with the same folder and name has saved."""
        self.modules, self.recipe = modules, recipe
        self.optimizers = make_optimizers(modules, recipe.matrix_lr, recipe.other_lr)
        self._full_rates = [[group["lr"] for group in one.param_groups] for one in self.optimizers]
        self.average = {key: value.clone() for key, value in modules.state_dict().items()}
        self.step, self._losses = 0, 0.0
        self._log: list[str] = []
        self._state_file, self._log_file = folder / f"{name}.pt", folder / f"{name}.jsonl"
        spent = self._load() if self._state_file.exists() else 0.0
        self._saved_at = time.monotonic()
        self._began = self._saved_at - spent

    def learn(self, loss: Loss) -> None:
        """One step."""
        rate = self.recipe.rate(self.step)
        for one, full_rates in zip(self.optimizers, self._full_rates, strict=True):
            for group, full in zip(one.param_groups, full_rates, strict=True):
                group["lr"] = full * rate
            one.zero_grad()
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        value = loss(self.step, generator)
        value.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for one in self.optimizers:
            one.step()
        self.step += 1
        keep = min(self.recipe.ema, self.step / (self.step + 10))
        with torch.no_grad():
            for key, weight in self.modules.state_dict().items():
                self.average[key].lerp_(weight, 1 - keep)
        self._losses += value.item() / LOG_EVERY

    def record(self) -> None:
        """Log every few steps, save every minute and at the end."""
        now = time.monotonic()
        if self.step % LOG_EVERY == 0:
            seconds, mean = round(now - self._began, 1), round(self._losses, 5)
            self._log.append(json.dumps({"step": self.step, "loss": mean, "seconds": seconds}))
            write_text(self._log_file, "\n".join(self._log) + "\n")
            self._losses = 0.0
        if now - self._saved_at > SAVE_EVERY or self.step == self.recipe.steps:
            self._save(now - self._began)
            self._saved_at = now

    def _save(self, seconds: float) -> None:
        state = {"step": self.step, "seconds": seconds, "average": self.average}
        state |= {"losses": self._losses, "log": self._log, "weights": self.modules.state_dict()}
        state |= {"optimizers": [one.state_dict() for one in self.optimizers]}
        with atomic_file(self._state_file) as partial:
            torch.save(state, partial)

    def _load(self) -> float:
        """Seconds that have been spent."""
        device = next(self.modules.parameters()).device
        state = torch.load(self._state_file, weights_only=True, map_location=device)
        self.step, self.average = state["step"], state["average"]
        self._losses, self._log = state["losses"], state["log"]
        self.modules.load_state_dict(state["weights"])
        for one, saved in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(saved)
        seconds: float = state["seconds"]
        return seconds


def train(
    folder: Path, name: str, modules: nn.Module, loss: Loss, recipe: Recipe
) -> dict[str, Tensor]:
    """Run the recipe's steps, from where an earlier call with the same folder and name stopped.

    Args:
        folder: where <name>.pt (the state, once a minute) and <name>.jsonl (the losses) lie.
        name: of this training.
        modules: what learns, on the device where it learns.
        loss: what it learns from.
        recipe: how long and how fast.

    Returns:
        Exponential moving average of the weights, by name.
    """
    run = Run(folder, name, modules, recipe)
    while run.step < recipe.steps:
        run.learn(loss)
        run.record()
    return run.average
