# SPDX-License-Identifier: Apache-2.0
"""A recorded step gives what computing it gives, for every step of every clip."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from pw_runtime.execution import step_replay
from pw_runtime.execution.protocols import TokenLayout
from pw_runtime.execution.step_replay import MOST_TOKENS, StepReplay
from pw_runtime.models.dit import Modulation
from pw_runtime.models.embeddings import Positions
from tests.engines.test_segments import DRAFT, network, segmented


class Recording:
    """Stand-in for a CUDA graph: computes again, into the memory of the recorded results."""

    again: Any

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.again()


class Texts(list[Any]):
    """A clip's texts, of which a test can see whether they are still there."""


class Clip:
    """A clip's step: its results, and how often it was computed."""

    def __init__(self, factor: float, tokens: int = 4) -> None:
        none = torch.empty(0)
        positions = Positions((1, 1, 1), none, none, none)
        self.texts = Texts([()])
        self.layout = TokenLayout(positions, tokens, tokens, ())
        self.factor, self.computed = factor, 0

    def compute(self, latent: Tensor, modulation: Modulation) -> list[Tensor]:
        self.computed += 1
        return [self.factor * latent + modulation.blocks - modulation.head]

    def step(self, replay: StepReplay, number: float) -> None:
        latent, rows = torch.full((2,), number), Modulation(torch.ones(2), torch.full((2,), number))
        (result,) = replay.velocities(self.compute, latent, self.texts, rows, self.layout)
        expected = self.factor * latent + rows.blocks - rows.head
        assert torch.equal(result, expected)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    made: list[Recording] = []

    def create() -> Recording:
        made.append(Recording())
        return made[-1]

    @contextmanager
    def recording(graph: Recording, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        yield

    original = StepReplay._record

    def record(self: StepReplay, compute: Any, latent: Tensor, rows: Modulation) -> bool:
        """Record: the first call is that of the capture, whose tensors a replay fills."""
        calls: list[tuple[Tensor, Modulation, list[Tensor]]] = []

        def captured(latent: Tensor, rows: Modulation) -> list[Tensor]:
            outputs = compute(latent, rows)
            calls.append((latent, rows, outputs))
            return outputs

        def again() -> None:
            latent, rows, outputs = calls[0]
            for target, value in zip(outputs, compute(latent, rows), strict=True):
                target.copy_(value)

        monkeypatch.setattr(Recording, "again", staticmethod(again), raising=False)
        return original(self, captured, latent, rows)

    monkeypatch.setattr(step_replay.torch.cuda, "CUDAGraph", create)
    monkeypatch.setattr(step_replay.torch.cuda, "graph", recording)
    monkeypatch.setattr(StepReplay, "_record", record)
    return made


def test_every_step_gets_its_own_numbers_and_only_the_first_is_not_replayed(recordings) -> None:
    replay, clip = StepReplay(print), Clip(2.0)
    for number in (1.0, 2.0, 3.0, 4.0):
        clip.step(replay, number)
    assert [recording.replays for recording in recordings] == [1 + 3]  # one to compare


def test_another_clip_is_recorded_anew(recordings) -> None:
    replay, one, other = StepReplay(print), Clip(2.0), Clip(3.0)
    for clip in (one, other, one):
        for number in (1.0, 2.0, 3.0):
            clip.step(replay, number)
    assert [recording.replays for recording in recordings] == [1 + 2] * 3


def test_results_of_a_step_stay_when_the_next_one_is_replayed(recordings) -> None:
    replay, clip = StepReplay(print), Clip(2.0)
    rows = Modulation(torch.zeros(2), torch.zeros(2))
    results = [
        replay.velocities(clip.compute, torch.full((2,), x), clip.texts, rows, clip.layout)[0]
        for x in (1.0, 2.0, 3.0)
    ]
    assert [float(result[0]) for result in results] == [2.0, 4.0, 6.0]


def test_large_clips_are_computed_step_by_step(recordings) -> None:
    replay, clip = StepReplay(print), Clip(2.0, MOST_TOKENS + 1)
    for number in (1.0, 2.0, 3.0):
        clip.step(replay, number)
    assert not recordings
    assert clip.computed == 3


def test_what_cannot_be_recorded_is_computed_and_told_once(recordings, monkeypatch) -> None:
    @contextmanager
    def refusing(graph: Recording, capture_error_mode: str) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(step_replay.torch.cuda, "graph", refusing)
    said: list[str] = []
    replay, clip = StepReplay(said.append), Clip(2.0)
    for number in (1.0, 2.0, 3.0):
        clip.step(replay, number)
    assert len(said) == 1
    assert said[0].endswith("operation not permitted when stream is capturing")


def test_a_recorded_step_with_other_numbers_is_never_used(recordings, monkeypatch) -> None:
    monkeypatch.setattr(Recording, "replay", lambda self: None)
    said: list[str] = []
    replay, clip = StepReplay(said.append), Clip(2.0)
    clip.step(replay, 1.0)
    clip.factor, before = 5.0, clip.compute

    def changing(latent: Tensor, rows: Modulation) -> list[Tensor]:
        clip.factor += 1
        return before(latent, rows)

    rows = Modulation(torch.zeros(2), torch.zeros(2))
    latent = torch.ones(2)
    (result,) = replay.velocities(changing, latent, clip.texts, rows, clip.layout)
    assert torch.equal(result, clip.factor * latent)
    assert said == [
        "steps are started kernel by kernel, not as a CUDA graph: a recorded step gave other "
        "numbers than the step itself"
    ]


@pytest.mark.parametrize("attempt", [2, 4])  # while it is recorded, while it is compared
def test_a_step_without_memory_for_its_recording_is_computed_and_told(recordings, attempt) -> None:
    said: list[str] = []
    replay, clip = StepReplay(said.append), Clip(2.0)
    compute = clip.compute

    def short(latent: Tensor, rows: Modulation) -> list[Tensor]:
        if clip.computed + 1 == attempt and not said:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")
        return compute(latent, rows)

    clip.compute = short
    for number in (1.0, 2.0, 3.0):
        clip.step(replay, number)
    assert said == [
        "steps are started kernel by kernel, not as a CUDA graph: CUDA out of memory. Tried to "
        "allocate 1 GiB"
    ]
    texts, clip.texts = weakref.ref(clip.texts), Texts()
    assert texts() is None  # nothing of the clip stays with what it will not replay


def test_nothing_of_a_clip_stays_while_the_texts_of_the_next_one_are_computed(recordings) -> None:
    replay, clip = StepReplay(print), Clip(2.0)
    net = segmented(network(DRAFT, "fp32"), "fp32", 16, replay=replay)
    for number in (1.0, 2.0):
        clip.step(replay, number)
    texts, clip.texts = weakref.ref(clip.texts), Texts()
    computing, seen = net._run, []

    def run(name: str, inputs: list[Tensor], **options: int) -> list[Tensor]:
        seen.append(texts())
        return computing(name, inputs, **options)

    net._run = run
    net.text_keys_values(torch.zeros(3, DRAFT.text_dim))
    assert seen
    assert not any(seen)
