# SPDX-License-Identifier: Apache-2.0
"""Which engines a network runs on, by policy and by what the store has."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from pw_engines import EngineError, EngineSpec, EngineStore
from pw_engines.eager import EagerEngine
from pw_runtime import engines
from pw_runtime.engines import Compiler, choose_engines, key_of
from pw_runtime.errors import BadRequest
from pw_runtime.segments import Segment, segments_of
from tests.engines.test_segments import DRAFT

CPU = torch.device("cpu")


@pytest.fixture
def segments() -> dict[str, Segment]:
    return segments_of(DRAFT, "fp32", 64)


@pytest.fixture
def store(
    tmp_path: Path, segments: dict[str, Segment], monkeypatch: pytest.MonkeyPatch
) -> EngineStore:
    """A store, and a compiler whose engines are files that say "good"."""

    def load(spec: EngineSpec, path: Path, device: torch.device) -> EagerEngine:
        if path.read_text() != "good":
            raise EngineError(f"{path} is no engine")
        return EagerEngine(spec, segments[spec.segment].module)

    def lacking(device: torch.device) -> str:
        return "not on this machine"

    compilers = {
        "tensorrt": Compiler("engine.plan", lacking, lambda device: (), load),
        "aoti": Compiler("engine.pt2", lambda device: None, lambda device: (("cpu", "any"),), load),
    }
    monkeypatch.setattr(engines, "COMPILERS", MappingProxyType(compilers))
    return EngineStore(tmp_path / "engines")


def put(store: EngineStore, segment: Segment, text: str = "good") -> None:
    key = key_of(segment, "aoti", CPU)
    with store.locked(key), store.publishing(key, "engine.pt2") as path:
        path.write_text(text)


def test_auto_takes_engines_that_are_all_there(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    for segment in segments.values():
        put(store, segment)
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.backend == "aoti"
    assert choice.engines.keys() == segments.keys()
    assert str(store.root) in choice.reason


def test_auto_runs_the_segments_where_one_engine_lacks_and_says_which(
    store: EngineStore, segments: dict[str, Segment]
) -> None:
    for segment in segments.values():
        if segment.name != "head":
            put(store, segment)
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.backend == "eager"
    assert choice.reason == "tensorrt: not on this machine; aoti: no head (not built yet)"


def test_engines_or_nothing(store: EngineStore, segments: dict[str, Segment]) -> None:
    with pytest.raises(BadRequest, match=r"(?s)lacks engines.*aoti: none is built.*pw build"):
        choose_engines(segments, "engines", store, CPU, "pw build")


def test_eager_does_not_look(store: EngineStore, segments: dict[str, Segment]) -> None:
    for segment in segments.values():
        put(store, segment)
    choice = choose_engines(segments, "eager", store, CPU, "pw build")
    assert (choice.backend, choice.reason) == ("eager", "asked for")


@pytest.mark.parametrize("policy", ["auto", "engines"])
def test_an_engine_that_cannot_be_opened_is_an_error(
    store: EngineStore, segments: dict[str, Segment], policy: engines.EnginePolicy
) -> None:
    for segment in segments.values():
        put(store, segment, "bad" if segment.name == "embed" else "good")
    with pytest.raises(BadRequest, match=r"(?s)cannot be opened.*is no engine.*pw engines prune"):
        choose_engines(segments, policy, store, CPU, "pw build")


def test_a_changed_file_counts_as_missing(store: EngineStore, segments: dict[str, Segment]) -> None:
    for segment in segments.values():
        put(store, segment)
    found = store.find(key_of(segments["embed"], "aoti", CPU))
    assert found.path is not None
    found.path.write_text("evil")
    choice = choose_engines(segments, "auto", store, CPU, "pw build")
    assert choice.backend == "eager"
    assert "no embed" in choice.reason
    assert "SHA-256 differs" in choice.reason
