# SPDX-License-Identifier: Apache-2.0
"""Plans are opened only if they are ours and run only on tensors that they may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pw_engines import tensorrt
from pw_engines.engine import EngineError, check_parity
from pw_engines.spec import DType, EngineKey, EngineSpec, TensorSpec
from pw_engines.store import EngineStore
from pw_engines.tensorrt.engine import TensorrtEngine, lane
from pw_engines.tensorrt.library import TENSORRT
from pw_engines.tensorrt.onnx_build import build_plan
from pw_engines.tensorrt.request import Request
from tests.closeness import relative_l2
from tests.engines.tensorrt.names import manifest, used
from tests.engines.tensorrt.segments import HIDDEN, TOKENS, WIDTH, aligned, data, onnx_of, spec
from tests.engines.tensorrt.segments import function as segment
from tests.engines.tensorrt.simulated import FAULT
from tests.engines.tensorrt.streams import Cuda

CPU = torch.device("cpu")
Open = Callable[..., TensorrtEngine]


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[[EngineSpec], Path]:
    """Builds a plan in this process."""

    def build(engine_spec: EngineSpec) -> Path:
        model, path = tmp_path / "model.onnx", tmp_path / tensorrt.FILE
        model.write_bytes(onnx_of(engine_spec))
        build_plan(Request(spec=engine_spec, model=model, plan=path, device=None))
        return path

    return build


@pytest.fixture
def engine(trt: Any, plan_of: Callable[[EngineSpec], Path]) -> TensorrtEngine:
    return tensorrt.load(spec(), plan_of(spec()), CPU)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-2)])
@pytest.mark.parametrize("version", manifest())
def test_a_plan_computes_what_its_segment_does(
    version: str,
    dtype: DType,
    tolerance: float,
    simulate: Callable[[str], Any],
    plan_of: Callable[[EngineSpec], Path],
) -> None:
    trt = simulate(version)
    engine_spec = spec(dtype)
    engine = tensorrt.load(engine_spec, plan_of(engine_spec), CPU)
    for seed in range(2):  # other addresses
        inputs, outputs, expected = data(engine_spec, seed=seed)
        engine.run(inputs, outputs)
        assert relative_l2(outputs[0], expected) < tolerance
    assert trt.seen <= used().keys()  # the walk through the source overlooks nothing


def test_from_build_process_through_store_to_result(trt: Any, tmp_path: Path) -> None:
    engine_spec = spec()
    lines: list[str] = []
    cache = tmp_path / "timing.cache"
    cache.write_text("of another device")
    store = EngineStore(tmp_path / "store")
    key = EngineKey(spec=engine_spec, backend="tensorrt", platform=tensorrt.tensorrt_platform(CPU))
    with store.locked(key), store.publishing(key, tensorrt.FILE) as path:
        tensorrt.build(
            engine_spec, onnx_of(engine_spec), path, CPU, timing_cache=cache, say=lines.append
        )
    lookup = store.find(key)
    assert lookup.state == "fresh"
    assert lookup.path is not None
    assert {file.name for file in lookup.path.parent.iterdir()} == {tensorrt.FILE, "manifest.json"}
    assert {file.name for file in tmp_path.iterdir()} == {"store", "timing.cache"}

    inputs, outputs, expected = data(engine_spec)
    tensorrt.load(engine_spec, lookup.path, CPU).run(inputs, outputs)
    assert relative_l2(outputs[0], expected) < 1e-2

    first, note, last = lines
    assert first.startswith("building up with TensorRT: 1 min, 4 GiB of memory")
    assert first.endswith("(estimate)")
    assert "starting a new one" in note
    assert last.startswith("built up in ")
    assert "peak memory" in last


class OnOwnMemory:
    """As on a GPU, where every tensor of its own has an aligned address."""

    def __init__(self, engine: TensorrtEngine) -> None:
        self.spec, self.backend, self.padded = engine.spec, engine.backend, engine.padded
        self._engine = engine

    def run(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        results = [aligned(x) for x in outputs]
        self._engine.run([aligned(x) for x in inputs], results)
        for target, x in zip(outputs, results, strict=True):
            target.copy_(x)


def test_self_check_finds_it_good(engine: TensorrtEngine) -> None:
    (parity,) = check_parity(OnOwnMemory(engine), segment, CPU)
    assert parity.good
    assert parity.error > 0


def run_with(engine: TensorrtEngine, index: int, x: Tensor) -> None:
    inputs, outputs, _ = data(engine.spec)
    tensors = [*inputs, *outputs]
    tensors[index] = x
    engine.run(tensors[:-1], tensors[-1:])


@pytest.mark.parametrize(
    ("index", "x", "message"),
    [
        (0, torch.zeros(TOKENS, WIDTH), "up, tensor x: expected bf16, got torch.float32"),
        (1, torch.zeros(HIDDEN, 31, dtype=torch.bfloat16), "tensor weight: expected 32 of 32"),
        (0, torch.zeros(23, WIDTH, dtype=torch.bfloat16), "tokens padded to 24, got 23"),
        (0, torch.zeros(25, WIDTH, dtype=torch.bfloat16), "tokens from 2 to 24, got 25"),
        (3, torch.zeros(23, HIDDEN, dtype=torch.bfloat16), r"y: expected shape \(24, 64\), got"),
        (1, torch.zeros(WIDTH, HIDDEN, dtype=torch.bfloat16).T, "weight: expected contiguous"),
        (2, torch.zeros(HIDDEN, dtype=torch.bfloat16, device="meta"), "bias: expected it on cpu"),
        (
            2,
            aligned(torch.zeros(HIDDEN + 1, dtype=torch.bfloat16))[1:],
            "bias: expected an address that is a multiple of 256, got 2 more; pass a whole tensor",
        ),
    ],
)
def test_tensors_that_the_plan_cannot_take_are_refused(
    index: int, x: Tensor, message: str, engine: TensorrtEngine
) -> None:
    with pytest.raises(ValueError, match=message):
        run_with(engine, index, x)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (spec("fp32"), "x: expected fp32, got bf16"),
        (spec(width=WIDTH * 2), r"x: expected shape \(24, 64\), got \(-1, 32\)"),
        (
            replace(spec(), inputs=(*spec().inputs[:2], TensorSpec(name="b", dtype="bf16",
                    shape=(HIDDEN,)))),
            "b: missing\n  bias: not in the spec",
        ),
        (
            replace(spec(), inputs=spec().inputs[:2], outputs=(*spec().outputs, spec().inputs[2])),
            "bias: expected an output, got an input",
        ),
    ],
)  # fmt: skip
def test_a_plan_of_another_spec_is_refused(
    expected: EngineSpec, message: str, trt: Any, plan_of: Callable[[EngineSpec], Path]
) -> None:
    path = plan_of(spec())
    with pytest.raises(EngineError, match=message):
        tensorrt.load(expected, path, CPU)


def test_a_plan_of_other_limits_is_refused(trt: Any, plan_of: Callable[[EngineSpec], Path]) -> None:
    path = plan_of(spec(tokens=16))
    with pytest.raises(EngineError, match=r"does not take x of \(24, 32\)\n  error: x: static"):
        tensorrt.load(spec(), path, CPU)


def test_a_truncated_plan_is_refused(trt: Any, plan_of: Callable[[EngineSpec], Path]) -> None:
    path = plan_of(spec())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(EngineError, match=r"build it again\n  error: Serialization assertion"):
        tensorrt.load(spec(), path, CPU)


def test_a_plan_of_another_version_is_refused(
    simulate: Callable[[str], Any], plan_of: Callable[[EngineSpec], Path]
) -> None:
    simulate("11.0.0.114")
    path = plan_of(spec())
    simulate("11.4.0.106")
    with pytest.raises(
        EngineError, match=r"11\.4\.0\.106 cannot open .*\n  error: .* of version 11\.0\.0"
    ):
        tensorrt.load(spec(), path, CPU)


def test_a_context_that_cannot_be_made_is_an_error(
    trt: Any, plan_of: Callable[[EngineSpec], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plan_of(spec())
    monkeypatch.setenv(FAULT, "no context")
    with pytest.raises(EngineError, match=r"cannot make a context .*\n  error: Error Code 2"):
        tensorrt.load(spec(), path, CPU)


def test_a_failed_execution_is_an_error(
    engine: TensorrtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, outputs, _ = data(engine.spec)
    monkeypatch.setenv(FAULT, "execution")
    with pytest.raises(EngineError, match=r"up failed in TensorRT\n  error: .*illegal memory"):
        engine.run(inputs, outputs)
    monkeypatch.delenv(FAULT)
    engine.run(inputs, outputs)  # and what was said before is not said again
    assert not torch.isnan(outputs[0]).any()


def test_a_context_without_addresses_or_scratch_runs_nothing(engine: TensorrtEngine) -> None:
    """What the simulator would say if run() forgot them."""
    shared = lane(CPU, TENSORRT)
    assert engine._context.execute_async_v3(shared.stream.cuda_stream) is False
    messages = str(shared.messages.error(""))
    assert "no address of x" in messages
    assert "bytes of scratch memory needed, got None" in messages


def test_engines_share_one_scratch_buffer_that_grows(
    trt: Any, plan_of: Callable[[EngineSpec], Path]
) -> None:
    small = tensorrt.load(spec(), plan_of(spec()), CPU)
    inputs, outputs, expected = data(small.spec)
    small.run(inputs, outputs)
    first = lane(CPU, TENSORRT).scratch
    lane(CPU, TENSORRT).reserve(first[1] * 100)
    second = lane(CPU, TENSORRT).scratch
    assert second[1] == first[1] * 100
    lane(CPU, TENSORRT).reserve(10)
    assert lane(CPU, TENSORRT).scratch == second
    outputs[0].fill_(float("nan"))
    small.run(inputs, outputs)
    assert small._context._memory == second
    assert relative_l2(outputs[0], expected) < 1e-2


def test_the_first_run_is_not_captured(engine: TensorrtEngine, cuda: Cuda) -> None:
    inputs, outputs, _ = data(engine.spec)
    cuda.capturing = True
    with pytest.raises(EngineError, match="run it once first"):
        engine.run(inputs, outputs)


def test_a_captured_graph_keeps_its_scratch(engine: TensorrtEngine, cuda: Cuda) -> None:
    inputs, outputs, _ = data(engine.spec)
    engine.run(inputs, outputs)
    cuda.capturing = True
    captured = lane(CPU, TENSORRT)._scratch
    engine.run(inputs, outputs)
    engine.run(inputs, outputs)
    cuda.capturing = False
    lane(CPU, TENSORRT).reserve(captured.numel() * 2)
    assert [buffer is captured for buffer in lane(CPU, TENSORRT)._captured] == [True]
    assert lane(CPU, TENSORRT)._scratch is not captured
