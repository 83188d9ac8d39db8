# SPDX-License-Identifier: Apache-2.0
"""The self-check trusts no engine, and engines refuse what they cannot take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pw_engines import aoti
from pw_engines.aoti import AotiEngine
from pw_engines.eager import EagerEngine
from pw_engines.engine import (
    TOLERANCES,
    EngineError,
    Parity,
    check_parity,
    random_inputs,
    require_parity,
)
from pw_engines.spec import SMALLEST, TensorSpec
from pw_engines.store import EngineStore
from tests.closeness import max_abs
from tests.engines.faulty import Fault, FaultyEngine
from tests.engines.small import LIMIT, Mix, key, spec, tensors

CPU = torch.device("cpu")


def test_the_segment_itself_is_exact() -> None:
    parities = check_parity(EagerEngine(spec(), Mix()), Mix(), CPU)
    assert [parity.output for parity in parities] == ["y", "mean"]
    assert all(parity.error == 0 and parity.good for parity in parities)
    require_parity("mix", parities)


@pytest.mark.parametrize(("padded", "tokens"), [(False, LIMIT * 2 // 5), (True, LIMIT)])
def test_padded_engines_are_checked_at_their_limits(padded: bool, tokens: int) -> None:
    seen = []

    def segment(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(x))
        return Mix()(x, weight)

    check_parity(FaultyEngine(spec(), segment, padded=padded), Mix(), CPU)
    assert seen == [tokens]


def test_nan_is_not_good() -> None:
    parities = check_parity(FaultyEngine(spec(), Mix(), fault="nan"), Mix(), CPU)
    assert [parity.good for parity in parities] == [False, True]
    with pytest.raises(
        EngineError, match=r"not compute what its segment does .*: y nan > 1\.0e-05"
    ):
        require_parity("mix", parities)


def test_an_output_left_alone_is_not_good() -> None:
    class Lazy(EagerEngine):
        def run(self, inputs: object, outputs: object) -> None:
            pass

    assert not any(parity.good for parity in check_parity(Lazy(spec(), Mix()), Mix(), CPU))


def test_an_engine_of_other_arithmetic_is_not_good() -> None:
    def nearly(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(y * (1 + 1e-4) for y in Mix()(x, weight))

    parities = check_parity(EagerEngine(spec(), nearly), Mix(), CPU)
    assert [parity.good for parity in parities] == [False, False]
    with pytest.raises(EngineError, match="run with --policy eager"):
        require_parity("mix", parities)


def test_tolerance_is_that_of_the_coarsest_tensor() -> None:
    inputs = (spec().inputs[0], TensorSpec(name="weight", dtype="bf16", shape=(8, 8)))

    def segment(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return Mix()(x, weight.float())

    parities = check_parity(EagerEngine(spec(inputs=inputs), segment), segment, CPU)
    assert {parity.tolerance for parity in parities} == {TOLERANCES["bf16"]}


@pytest.mark.parametrize("error", [float("nan"), float("inf"), 1.1e-5])
def test_only_small_errors_are_good(error: float) -> None:
    assert not Parity(output="y", error=error, tolerance=1e-5).good
    assert Parity(output="y", error=0.9e-5, tolerance=1e-5).good


def test_random_data_is_the_same_for_the_same_seed() -> None:
    first, second, third = (random_inputs(spec(), {"tokens": 4}, CPU, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], third[0])


@pytest.mark.parametrize(
    ("fault", "error"),
    [("error", EngineError), ("out of memory", torch.OutOfMemoryError)],
)
def test_a_faulty_engine_fails_at_its_call_only(fault: Fault, error: type[Exception]) -> None:
    entered: list[int] = []
    engine = FaultyEngine(spec(), Mix(), fault=fault, at=2, entered=entered.append)
    inputs, outputs = tensors(4)
    engine.run(inputs, outputs)
    with pytest.raises(error):
        engine.run(inputs, outputs)
    engine.run(inputs, outputs)
    assert entered == [1, 2, 3]
    assert not torch.isnan(outputs[0]).any()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := aoti.unavailable(CPU):
        pytest.skip(reason)
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # one build for all workers
    store, expected = EngineStore(base / "aoti"), key(platform=aoti.aoti_platform(CPU))
    with store.locked(expected):
        if store.find(expected).state == "missing":
            with store.publishing(expected, aoti.FILE) as building:
                aoti.build(spec(), Mix(), building, CPU)
    path = store.find(expected).path
    assert path is not None
    return path


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [SMALLEST, 3, 17, LIMIT])
def test_a_package_serves_every_size(tokens: int, package: Path) -> None:
    engine = aoti.load(spec(), package, CPU)
    inputs, outputs = tensors(tokens)
    engine.run(inputs, outputs)
    for got, expected in zip(outputs, Mix()(*inputs), strict=True):
        assert max_abs(got, expected) < 1e-6
    require_parity("mix", check_parity(engine, Mix(), CPU))


@pytest.mark.slow
def test_a_package_is_given_only_what_it_can_take(package: Path) -> None:
    engine = AotiEngine(spec(), package, CPU)
    inputs, outputs = tensors(4)
    untouched = [x.clone() for x in outputs]
    for refused, message in (
        ([inputs[0].double(), inputs[1]], "x: expected fp32, got torch.float64"),
        ([torch.zeros(LIMIT + 1, 8), inputs[1]], "tokens from 2 to 40, got 41"),
        ([inputs[0], inputs[1][:7]], "weight: expected 8 of 8"),
        ([inputs[0], inputs[1].T], "mix, tensor weight: expected contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.run(refused, outputs)
    with pytest.raises(ValueError, match=r"y: expected shape \(4, 8\)"):
        engine.run(inputs, [torch.zeros(3, 8), outputs[1]])
    for x, before in zip(outputs, untouched, strict=True):
        assert torch.equal(x, before) or torch.isnan(x).all()


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 1000, -1000])
def test_a_damaged_package_is_an_error(kept: int, package: Path, tmp_path: Path) -> None:
    damaged = tmp_path / aoti.FILE
    damaged.write_bytes(package.read_bytes()[:kept])
    with pytest.raises(EngineError, match="PyTorch cannot open"):
        aoti.load(spec(), damaged, CPU)


@pytest.mark.slow
def test_a_segment_that_cannot_be_compiled_is_an_error(tmp_path: Path) -> None:
    class Branching(Mix):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if x.sum() > 0:  # depends on data
                return super().forward(x, weight)
            return super().forward(-x, weight)

    with pytest.raises(EngineError, match="AOTInductor cannot compile mix: "):
        aoti.build(spec(), Branching(), tmp_path / aoti.FILE, CPU)


def test_a_machine_without_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aoti.shutil, "which", lambda name: None)
    assert "install g++" in str(aoti.unavailable(CPU))


def test_platform_of_a_package_is_this_machine() -> None:
    facts = dict(aoti.aoti_platform(CPU))
    assert facts["torch"] == torch.__version__
    assert facts.keys() == {"torch", "machine", "processor", "recipe"}
