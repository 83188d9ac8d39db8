# SPDX-License-Identifier: Apache-2.0
"""Built engines are measured once at each size, in a process of its own, and wrong ones removed."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import nn

from pw_engines import EngineError, EngineSpec, EngineStore, Speed, openvino
from pw_engines.eager import EagerEngine
from pw_export import build_speed
from pw_export.build_jobs import Job, TransformerSource, jobs_for, pick_compilers, platform_for
from pw_export.build_speed import Measured, measure_jobs, sizes_of
from pw_runtime.errors import BadRequest
from pw_runtime.execution.compilers import COMPILERS
from pw_runtime.execution.transformer_segments import segments_of
from tests.engines.test_segments import DRAFT

CPU = torch.device("cpu")
CHUNK = 64
OPENED: list[str] = []


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "engines")


@pytest.fixture
def jobs(store: EngineStore) -> list[Job]:
    """The head's engine, built; its file says how it behaves."""
    source = TransformerSource(DRAFT, "fp32", CHUNK)
    missing, _ = jobs_for([source], "aoti", CPU, store, platform_for("aoti", CPU))
    (job,) = (job for job in missing if job.segment == "head")
    publish(store, job, "good")
    return [job]


def publish(store: EngineStore, job: Job, text: str) -> None:
    with store.locked(job.key), store.publishing(job.key, "engine.pt2") as path:
        path.write_text(text)


def load(spec: EngineSpec, path: Path, device: torch.device) -> EagerEngine:
    """Open an engine that is the segment, or cannot be opened."""
    OPENED.append(path.read_text())
    module: nn.Module = segments_of(DRAFT, "fp32", CHUNK)[spec.segment].module
    if OPENED[-1] == "broken":
        raise EngineError("PyTorch cannot open it")
    return EagerEngine(spec, module)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    OPENED.clear()
    compilers = {**COMPILERS, "aoti": replace(COMPILERS["aoti"], load=load)}
    monkeypatch.setattr(build_speed, "COMPILERS", MappingProxyType(compilers))
    monkeypatch.setattr("pw_engines.speed.SECONDS", 0.0)


def test_what_is_known_is_not_measured_again(store: EngineStore, jobs: list[Job]) -> None:
    (first,) = build_speed._measure(jobs, 24)
    assert first.speed is not None
    assert (first.speed.tokens, first.speed.error) == (24, 0.0)
    assert store.find(jobs[0].key).speeds == (first.speed,)
    assert build_speed._measure(jobs, 24) == [first]
    assert OPENED == ["good"]
    build_speed._measure(jobs, 48)
    assert [speed.tokens for speed in store.find(jobs[0].key).speeds] == [24, 48]


def test_what_is_known_on_another_number_of_threads_is_measured_again(
    store: EngineStore, jobs: list[Job]
) -> None:
    other = Speed(tokens=24, threads=torch.get_num_threads() + 1, seconds=1.0, eager=2.0, error=0.0)
    store.record(jobs[0].key, other)
    (measured,) = build_speed._measure(jobs, 24)
    assert measured.speed is not None
    assert measured.speed.threads == torch.get_num_threads()
    assert store.find(jobs[0].key).speeds == (measured.speed, other)


def test_an_engine_that_is_wrong_at_this_size_is_removed(
    store: EngineStore, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: object) -> dict[str, Speed]:
        return {"aoti": Speed(tokens=24, threads=1, seconds=1.0, eager=2.0, error=float("nan"))}

    monkeypatch.setattr(build_speed, "measure_speed", wrong)
    (measured,) = build_speed._measure(jobs, 24)
    assert measured.speed is not None
    assert "removed: with 24 tokens it is nan from its segment" in str(measured.error)
    assert measured.removed
    assert store.find(jobs[0].key).state == "missing"
    # Seen: a traceback at the next size.
    assert build_speed._measure(jobs, 48) == [
        Measured(jobs[0], error="not measured: it is not in the store")
    ]


def test_an_engine_that_cannot_be_opened_is_not_measured(
    store: EngineStore, jobs: list[Job]
) -> None:
    store.remove(jobs[0].key.folder)
    publish(store, jobs[0], "broken")
    assert build_speed._measure(jobs, 24) == [
        Measured(jobs[0], error="not measured: PyTorch cannot open it")
    ]


def test_an_engine_that_is_removed_before_it_is_opened_is_not_measured(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(spec: EngineSpec, path: Path, device: torch.device) -> EagerEngine:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    compilers = {**COMPILERS, "aoti": replace(COMPILERS["aoti"], load=gone)}
    monkeypatch.setattr(build_speed, "COMPILERS", MappingProxyType(compilers))
    (measured,) = build_speed._measure(jobs, 24)
    assert "not measured: an engine is gone or unreadable" in str(measured.error)


def test_a_process_that_dies_leaves_the_engines_unmeasured(
    store: EngineStore, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_speed, "_measure", _die)
    (measured,) = measure_jobs(jobs, [24])
    assert "its process was killed" in str(measured.error)
    assert store.find(jobs[0].key).speeds == ()


def _die(jobs: list[Job], size: int) -> list[Measured]:
    os._exit(1)


def test_sizes_are_those_of_the_calls(jobs: list[Job]) -> None:
    spec = jobs[0].key.spec
    assert sizes_of(spec, (24, 100, 50)) == [24, 50]  # 100 tokens take two calls of 50
    assert sizes_of(replace(spec, inputs=(), outputs=(), limits=()), (24, 100)) == [0]


def test_auto_compares_what_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "unavailable", lambda device: None)
    assert pick_compilers("auto", None, CPU, "fp32", "exact") == ["aoti", "openvino"]
    assert pick_compilers("auto", None, CPU, "bf16", "exact") == ["aoti"]
    assert pick_compilers("auto", None, CPU, "fp32", "int8") == ["aoti"]
    assert pick_compilers("openvino", None, CPU, "fp32", "exact") == ["openvino"]
    with pytest.raises(BadRequest, match=r"(?s)OpenVINO's engines are fp32.*--precision bf16"):
        pick_compilers("openvino", None, CPU, "bf16", "exact")
    monkeypatch.setattr("pw_engines.aoti.shutil.which", lambda name: None)
    assert pick_compilers("auto", None, CPU, "fp32", "exact") == ["openvino"]


def test_openvino_that_is_missing_is_refused_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openvino, "unavailable", lambda device: "OpenVINO is not installed: pip")
    assert pick_compilers("auto", None, CPU, "fp32", "exact") == ["aoti"]
    with pytest.raises(BadRequest, match=r"(?s)for the CPU by openvino.*is not installed: pip"):
        pick_compilers("openvino", None, CPU, "fp32", "exact")
