# SPDX-License-Identifier: Apache-2.0
"""The prompts of a fleet: which wait, who has which, and what became of each.

A prompt is handed out again when its worker dies or fails with it, a bounded number of times, and
never to two workers at once. Every method may be called from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pw_runtime.types import Outcome, Prompt

MAX_DEATHS = 3  # workers that may die over a prompt before it counts as the cause
MAX_ERRORS = 2  # workers that may fail with a prompt: a broken machine is not the prompt's fault


@dataclass(slots=True)
class _Item:
    """A prompt and its history."""

    prompt: Prompt
    deaths: int = 0
    errors: list[str] = field(default_factory=list)
    tried_by: set[str] = field(default_factory=set)  # workers that died over it or failed with it
    video: Path | None = None
    error: str | None = None  # the final one

    @property
    def is_over(self) -> bool:
        return self.video is not None or self.error is not None


class WorkQueue:
    """Hands out batches of prompts to workers by name."""

    def __init__(self, prompts: Sequence[Prompt], batch: int) -> None:
        """Hand out at most `batch` prompts at a time, in their order."""
        self._items = {prompt.id: _Item(prompt) for prompt in prompts}
        self._waiting = deque(self._items.values())
        self._held: dict[str, list[_Item]] = {}  # by worker, of those that are present
        self._batch = batch
        self._stopped = False
        self._changed = threading.Condition()
        self.fatal: Exception | None = None

    def enter(self, worker: str) -> None:
        """Count a worker as present."""
        with self._changed:
            self._held[worker] = []
            self._changed.notify_all()

    def leave(self, worker: str, reason: str) -> tuple[str, ...]:
        """Take back what a worker has not finished; return the ids of prompts that this ends.

        Whoever leaves with prompts in hand has died over one of them: each of them is tried again,
        alone, by another worker if there is one, and fails after MAX_DEATHS.
        """
        with self._changed:
            ended = []
            for item in reversed(self._held.pop(worker, [])):
                item.deaths += 1
                item.tried_by.add(worker)
                if item.deaths < MAX_DEATHS:
                    self._waiting.appendleft(item)
                    continue
                item.error = (
                    f"{item.deaths} workers died while they made it, the last one: {reason}"
                )
                ended.append(item.prompt.id)
            self._changed.notify_all()
            return tuple(ended)

    def take(self, worker: str) -> tuple[Prompt, ...]:
        """Wait for work and return a worker's next batch; empty when there will be none."""
        with self._changed:
            while not self._stopped:
                if batch := self._next(worker):
                    self._held[worker] = batch
                    return tuple(item.prompt for item in batch)
                if not self._waiting and not any(self._held.values()):
                    break
                self._changed.wait()
            return ()

    def _next(self, worker: str) -> list[_Item]:
        """Remove the worker's next batch from those that wait."""
        present = self._held.keys()
        fitting = [
            item
            for item in self._waiting
            if worker not in item.tried_by or not present - item.tried_by
        ]
        batch = fitting[:1]
        if batch and not _has_history(batch[0]):
            batch = [item for item in fitting if not _has_history(item)][: self._batch]
        for item in batch:
            self._waiting.remove(item)
        return batch

    def holds(self, worker: str, prompt_id: str) -> bool:
        """Tell whether a worker has a prompt in hand: nobody else may finish it."""
        with self._changed:
            return any(item.prompt.id == prompt_id for item in self._held.get(worker, ()))

    def made(self, worker: str, prompt_id: str, video: Path) -> None:
        """Record that a worker's clip is in the output folder."""
        with self._changed:
            self._drop(worker, prompt_id).video = video
            self._changed.notify_all()

    def failed(self, worker: str, prompt_id: str, error: str) -> bool:
        """Record that a worker failed with a prompt; return whether that is final.

        It is tried once more, alone, and on another worker if there is one.
        """
        with self._changed:
            item = self._drop(worker, prompt_id)
            item.errors.append(error)
            item.tried_by.add(worker)
            if len(item.errors) >= MAX_ERRORS:
                item.error = error
            else:
                self._waiting.append(item)
            self._changed.notify_all()
            return item.error is not None

    def _drop(self, worker: str, prompt_id: str) -> _Item:
        item = self._items[prompt_id]
        self._held[worker].remove(item)
        return item

    def in_hand(self, worker: str) -> tuple[Prompt, ...]:
        """Return the prompts that a worker has taken and not finished."""
        with self._changed:
            return tuple(item.prompt for item in self._held.get(worker, ()))

    def hand_back(self, worker: str) -> None:
        """Take back what a worker has in hand, by no fault of the prompts."""
        with self._changed:
            self._waiting.extendleft(reversed(self._held[worker]))
            self._held[worker] = []
            self._changed.notify_all()

    def is_present(self, worker: str) -> bool:
        """Tell whether a worker has entered and not left."""
        with self._changed:
            return worker in self._held

    @property
    def is_draining(self) -> bool:
        """True if no further prompt is handed out."""
        with self._changed:
            return self._stopped

    @property
    def present(self) -> int:
        """The number of workers that are present."""
        with self._changed:
            return len(self._held)

    @property
    def running(self) -> int:
        """The number of prompts in hand."""
        with self._changed:
            return sum(map(len, self._held.values()))

    def drain(self) -> None:
        """Hand out no further prompt."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def abort(self, error: Exception) -> None:
        """Hand out no further prompt, for an error that no worker could avoid; the first counts."""
        with self._changed:
            self.fatal = self.fatal or error
            self._stopped = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is left to do, up to a time; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(self._is_over, seconds)

    def _is_over(self) -> bool:
        if self.fatal is not None:
            return True
        return not any(self._held.values()) and (self._stopped or not self._waiting)

    @property
    def nothing_made(self) -> bool:
        """True while no clip has been made."""
        with self._changed:
            return all(item.video is None for item in self._items.values())

    def outcomes(self) -> dict[str, Outcome]:
        """Return the outcome of every prompt that is over, by id."""
        with self._changed:
            return {
                prompt_id: Outcome(prompt=item.prompt, video=item.video, error=item.error)
                for prompt_id, item in self._items.items()
                if item.is_over
            }


def _has_history(item: _Item) -> bool:
    return bool(item.deaths or item.errors)
