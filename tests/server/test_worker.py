# SPDX-License-Identifier: Apache-2.0
"""The worker's program, with jobs that fail in a process that may be good for nothing more."""

from __future__ import annotations

import io
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pw_runtime.errors import BadResult
from pw_runtime.presets import find_preset
from pw_runtime.server import maker, worker
from pw_runtime.server.maker import Maker
from pw_runtime.server.messages import Event, Join, Make, order_line
from pw_runtime.types import RunOptions


def events_of_a_failed_job(monkeypatch: pytest.MonkeyPatch, probe: Exception | None) -> list[Event]:
    """Return what a worker says that is given one job, which fails; `probe` is raised after it."""

    class Failing:
        device, bundle, fits = "cuda:0", SimpleNamespace(digest="0"), dict[str, Any]()

        def __init__(self, *arguments: object) -> None:
            """Open nothing."""

        def make(self, *arguments: object) -> None:
            raise BadResult("numbers overflow")

        def recover(self) -> None:
            if probe is not None:
                raise probe

    monkeypatch.setattr(maker, "Maker", Failing)
    preset, told = find_preset("nano"), list[Event]()
    join = Join(model="model", presets={}, options=RunOptions())
    job = Make(
        job="video_1", folder="job", prompt="a", negative="", seed=1, preset=preset, draft_only=True
    )
    orders = worker.Orders(io.BytesIO(order_line(join) + order_line(job)))
    sink: Any = SimpleNamespace(send=told.append)
    with nullcontext() if probe is None else pytest.raises(type(probe)):
        worker._work(orders.join(), orders, sink)
    return told


def test_a_job_that_failed_on_a_sound_device_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    events = events_of_a_failed_job(monkeypatch, None)
    assert [event.kind for event in events] == ["ready", "failed"]


def test_a_job_that_failed_with_its_gpu_is_left_to_another_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen: after an illegal access every queued job failed."""
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert [event.kind for event in events_of_a_failed_job(monkeypatch, broken)] == ["ready"]


@pytest.mark.parametrize(
    ("on_zeros", "on_synchronize", "works"),
    [
        (None, None, True),
        (torch.OutOfMemoryError("others have the memory"), None, True),
        (RuntimeError("illegal access"), None, False),
        (None, RuntimeError("uncorrectable ECC error"), False),
    ],
)
def test_a_gpu_works_unless_it_refuses_all_work(
    on_zeros: Exception | None,
    on_synchronize: Exception | None,
    works: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def doing(error: Exception | None) -> Any:
        def do(*arguments: object, **options: object) -> None:
            if error is not None:
                raise error

        return do

    monkeypatch.setattr(torch, "zeros", doing(on_zeros))
    monkeypatch.setattr(torch.cuda, "synchronize", doing(on_synchronize))
    made = Maker.__new__(Maker)
    made._torch_device = torch.device("cuda")
    if works:
        made.recover()
    else:
        with pytest.raises(RuntimeError):
            made.recover()
