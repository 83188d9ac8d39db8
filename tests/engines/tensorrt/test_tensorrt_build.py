# SPDX-License-Identifier: Apache-2.0
"""Building plans: what TensorRT is asked for, and what is said when it fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pw_engines import tensorrt
from pw_engines.engine import EngineError
from pw_engines.tensorrt.library import TENSORRT
from pw_engines.tensorrt.onnx_build import build_plan
from pw_engines.tensorrt.request import Request
from tests.engines.tensorrt.names import manifest
from tests.engines.tensorrt.segments import TOKENS, WIDTH, onnx_of, spec
from tests.engines.tensorrt.simulated import FAULT, read_plan

CPU = torch.device("cpu")


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[..., Request]:
    def make(model: bytes, **changes: Any) -> Request:
        (tmp_path / "model.onnx").write_bytes(model)
        request = Request(
            spec=spec(), model=tmp_path / "model.onnx", plan=tmp_path / "plan", device=None
        )
        return replace(request, **changes)

    return make


def test_a_request_survives_its_file(request_of: Callable[..., Request], tmp_path: Path) -> None:
    for cache in (None, tmp_path / "timing.cache"):
        request = request_of(b"", device=1, timing_cache=cache)
        assert Request.from_json(request.to_json()) == request


@pytest.mark.parametrize("version", manifest())
def test_builder_is_asked_for_an_exact_graph_on_one_stream(
    version: str, simulate: Callable[[str], Any], request_of: Callable[..., Request]
) -> None:
    simulate(version)
    request = request_of(onnx_of(spec()))
    assert build_plan(request) == []
    plan = read_plan(request.plan.read_bytes())
    assert plan["strongly typed"] == version.startswith("10")  # always so from 11 on
    assert plan["flags"] == []  # TF32 is on until it is cleared
    assert plan["aux streams"] == 0
    assert plan["workspace"] == TENSORRT.workspace
    assert plan["shapes"] == {"x": [TOKENS, WIDTH]}


def test_a_model_without_varying_sizes_needs_no_profile(
    trt: Any, request_of: Callable[..., Request]
) -> None:
    request = request_of(onnx_of(spec(), fixed=True))
    build_plan(request)
    assert read_plan(request.plan.read_bytes())["shapes"] == {}


def test_parser_errors_name_the_node(
    trt: Any, request_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT, "refuse Gelu")
    with pytest.raises(EngineError, match=r"node activate \(Gelu\): No importer") as caught:
        build_plan(request_of(onnx_of(spec())))
    assert "error: ModelImporter: parsing failed" in str(caught.value)


def test_a_failed_build_quotes_tensorrt(
    trt: Any, request_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT, "no plan")
    request = request_of(onnx_of(spec()))
    with pytest.raises(EngineError, match=r"cannot build up\n  error: Could not find any impl"):
        build_plan(request)
    assert not request.plan.exists()


def test_a_model_of_another_segment_is_refused_before_the_build(
    trt: Any, request_of: Callable[..., Request]
) -> None:
    other = spec("fp32", width=WIDTH + 1)
    with pytest.raises(EngineError, match=r"the ONNX model is not one of up") as caught:
        build_plan(request_of(onnx_of(other)))
    assert "x: expected bf16, got fp32" in str(caught.value)


def test_a_machine_without_a_gpu_is_reported(trt: Any, request_of: Callable[..., Request]) -> None:
    def refuse(logger: Any) -> None:
        logger.log(trt.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.Builder = refuse
    with pytest.raises(EngineError, match=r"cannot start on this device\n  error: CUDA init"):
        build_plan(request_of(onnx_of(spec())))


def test_timing_cache_is_made_used_and_started_anew(
    simulate: Callable[[str], Any], request_of: Callable[..., Request], tmp_path: Path
) -> None:
    cache = tmp_path / "timing.cache"
    request = request_of(onnx_of(spec()), timing_cache=cache)

    def known() -> str:
        return read_plan(request.plan.read_bytes())["timing cache"]

    simulate("11.0.0.114")
    assert build_plan(request) == []
    assert known() == ""
    assert cache.read_text() == "11.0.0.114"
    assert build_plan(request) == []
    assert known() == "11.0.0.114"
    simulate("11.4.0.106")
    (note,) = build_plan(request)
    assert "is for another device or version: starting a new one" in note
    assert known() == ""
    assert cache.read_text() == "11.4.0.106"
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "plan", "timing.cache"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "killed",
            r"the build of up was killed \(signal 9\), .*\n  got to: \d\.\d GiB\n  expected",
        ),
        # and no warning of Python's before it: seen when the package imported the program it runs
        ("no plan", r"^TensorRT \S+ cannot build up\n  error: Could not find any implementation"),
    ],
)
def test_a_build_process_that_fails_leaves_a_message_and_nothing_else(
    fault: str, message: str, trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT, fault)
    with pytest.raises(EngineError, match=message):
        tensorrt.build(spec(), onnx_of(spec()), tmp_path / "plan", CPU, say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_build_process_is_quoted(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PW_SIMULATED_TENSORRT", "9.9")
    with pytest.raises(EngineError, match=r"(?s)ended with exit code 1: .*KeyError: '9\.9'"):
        tensorrt.build(spec(), onnx_of(spec()), tmp_path / "plan", CPU, say=lambda line: None)


def test_a_model_that_cannot_be_imported_starts_no_process(trt: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not valid"):
        tensorrt.build(spec(), b"no model", tmp_path / "plan", CPU, say=print)
