# SPDX-License-Identifier: Apache-2.0
"""The loop of all training programs: can be stopped and continued, logs JSON lines.

A step draws all random numbers from a generator seeded by its number, so that a run that was
stopped and continued equals one that was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pw_export.nano.optimizer import make_optimizers
from pw_runtime.system.atomic_files import atomic_file, write_text

Loss = Callable[[int, torch.Generator], Tensor]
"""Function of the number and the generator of a step."""

SAVE_EVERY = 60.0  # seconds
LOG_EVERY = 20  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Steps, learning rates and averaging of a training."""

    steps: int
    matrix_lr: float = 0.0  # of Muon
    other_lr: float  # of AdamW
    warmup: int = 50  # steps
    decay: float = 0.35  # share of the steps, at the end, in which the rates fall to 0
    ema: float = 0.998
    seed: int = 0

    def rate(self, step: int) -> float:
        """Return the factor of the learning rates at a step."""
        falling = (self.steps - step) / (self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, max(falling, 0.0))


def adopt(modules: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Begin with known weights instead of random ones, where `modules` has them.

    Of a table that has grown, the known rows are taken. Weights that only `modules` has stay as
    they are. Raises ValueError where the sizes of a weight differ otherwise.
    """
    own = modules.state_dict()
    for name, tensor in tensors.items():
        rows = own[name][: len(tensor)]
        if rows.shape != tensor.shape:
            raise ValueError(f"{name} is {list(own[name].shape)}, known: {list(tensor.shape)}")
        rows.copy_(tensor)


class Run:
    """A training in progress: its modules, its state, its files."""

    def __init__(self, folder: Path, name: str, modules: nn.Module, recipe: Recipe) -> None:
        """Start, or continue from the state saved by an earlier run of this folder and name.

        Raises ValueError for a state of another recipe.
        """
        self.modules, self.recipe = modules, recipe
        self.optimizers = make_optimizers(modules, recipe.matrix_lr, recipe.other_lr)
        self._full_rates = [
            [group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers
        ]
        self.average = {key: value.clone() for key, value in modules.state_dict().items()}
        self.step, self._losses = 0, 0.0
        self._log: list[str] = []
        self._state_file, self._log_file = folder / f"{name}.pt", folder / f"{name}.jsonl"
        spent = self._load() if self._state_file.exists() else 0.0
        self._saved_at = time.monotonic()
        self._began = self._saved_at - spent

    def learn(self, loss: Loss) -> None:
        """Run one step."""
        rate = self.recipe.rate(self.step)
        for optimizer, full_rates in zip(self.optimizers, self._full_rates, strict=True):
            for group, full in zip(optimizer.param_groups, full_rates, strict=True):
                group["lr"] = full * rate
            optimizer.zero_grad()
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        value = loss(self.step, generator)
        value.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
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
        state: dict[str, Any] = {"step": self.step, "steps": self.recipe.steps, "seconds": seconds}
        state |= {"average": self.average}
        state |= {"losses": self._losses, "log": self._log, "weights": self.modules.state_dict()}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        with atomic_file(self._state_file) as partial:
            torch.save(state, partial)

    def _load(self) -> float:
        """Load the saved state; return the seconds spent so far."""
        device = next(self.modules.parameters()).device
        state = torch.load(self._state_file, weights_only=True, map_location=device)
        if state["steps"] != self.recipe.steps:
            raise ValueError(
                f"{self._state_file} is a training of {state['steps']} steps, not of "
                f"{self.recipe.steps}: continue it as it was begun, or remove the file"
            )
        self.step, self.average = state["step"], state["average"]
        self._losses, self._log = state["losses"], state["log"]
        self.modules.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        seconds: float = state["seconds"]
        return seconds


def is_complete(folder: Path, name: str) -> bool:
    """Return whether a training of this folder and name has run all of its steps."""
    file = folder / f"{name}.pt"
    if not file.exists():
        return False
    state = torch.load(file, weights_only=True, map_location="cpu")
    return bool(state["step"] == state["steps"])


def train(
    folder: Path, name: str, modules: nn.Module, loss: Loss, recipe: Recipe
) -> dict[str, Tensor]:
    """Run the steps of a recipe, continuing an earlier call with the same folder and name.

    Args:
        folder: folder of <name>.pt (the state, once a minute) and <name>.jsonl (the losses).
        name: name of this training.
        modules: modules to train, on the device to train on.
        loss: the loss.
        recipe: steps and learning rates.

    Returns:
        Exponential moving average of the weights, by name.
    """
    run = Run(folder, name, modules, recipe)
    while run.step < recipe.steps:
        run.learn(loss)
        run.record()
    return run.average
