# SPDX-License-Identifier: Apache-2.0
"""The same round trip where TensorRT and a GPU are: pytest -m gpu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pw_engines import tensorrt
from pw_engines.engine import EngineError, check_parity, require_parity
from pw_engines.spec import DType, EngineKey, EngineSpec
from pw_engines.store import EngineStore
from pw_engines.tensorrt.engine import TensorrtEngine
from tests.closeness import relative_l2
from tests.engines.tensorrt.segments import data, function, onnx_of, spec

GPU = torch.device("cuda", 0)
REASON = tensorrt.unavailable(GPU)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
Built = Callable[[EngineSpec], TensorrtEngine]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Builds a segment through the store, once."""
    root = tmp_path_factory.mktemp("store")
    store = EngineStore(root)

    def get(engine_spec: EngineSpec) -> TensorrtEngine:
        key = EngineKey(
            spec=engine_spec, backend="tensorrt", platform=tensorrt.tensorrt_platform(GPU)
        )
        if store.find(key).state != "fresh":
            with store.locked(key), store.publishing(key, tensorrt.FILE) as path:
                cache = root / "timing.cache"
                tensorrt.build(engine_spec, onnx_of(engine_spec), path, GPU, timing_cache=cache)
        path = store.find(key).path
        assert path is not None
        return tensorrt.load(engine_spec, path, GPU)

    return get


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_plan_computes_what_its_segment_does(dtype: DType, built: Built) -> None:
    engine = built(spec(dtype))
    require_parity("up", check_parity(engine, function, GPU))


def test_calls_may_follow_each_other_without_waiting(built: Built) -> None:
    """Two engines, one scratch buffer, other addresses at every call."""
    engines = [built(spec("bf16")), built(spec("bf16", tokens=512, width=256))]
    calls = [(engine, *data(engine.spec, "cuda", seed)) for seed in range(8) for engine in engines]
    for engine, inputs, outputs, _ in calls:
        engine.run(inputs, outputs)
    for _, _, outputs, expected in calls:
        assert relative_l2(outputs[0], expected) < 2e-2


def test_a_captured_graph_gives_the_same_bits(built: Built) -> None:
    engine = built(spec("bf16"))
    inputs, outputs, _ = data(engine.spec, "cuda")
    engine.run(inputs, outputs)
    expected = outputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.run(inputs, outputs)
        engine.run(inputs, outputs)
    outputs[0].fill_(float("nan"))
    graph.replay()
    assert torch.equal(outputs[0], expected)


def test_a_damaged_plan_is_refused(built: Built, tmp_path: Path) -> None:
    path = tmp_path / tensorrt.FILE
    path.write_bytes(b"no plan" * 1000)
    with pytest.raises(EngineError, match="build it again"):
        tensorrt.load(spec("bf16"), path, GPU)


def test_tensorrt_refuses_what_our_rules_would_not_let_through(tmp_path: Path) -> None:
    """A type clash: strongly typed networks take no fp32 weight for a bf16 input."""
    bf16, fp32 = spec("bf16"), spec("fp32")
    mixed = EngineSpec(
        segment="mixed",
        inputs=(bf16.inputs[0], *fp32.inputs[1:]),
        outputs=bf16.outputs,
        limits=bf16.limits,
        sources="0",
    )
    with pytest.raises(EngineError):
        tensorrt.build(mixed, onnx_of(mixed), tmp_path / tensorrt.FILE, GPU)
