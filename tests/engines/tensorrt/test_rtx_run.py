# SPDX-License-Identifier: Apache-2.0
"""Plans of TensorRT for RTX in the simulator: validity, the runtime cache, exact results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pw_engines import engine as engine_module
from pw_engines.engine import EngineError
from pw_engines.tensorrt import driver, rtx
from pw_engines.tensorrt.engine import TensorrtEngine
from pw_engines.tensorrt.onnx_build import build_plan
from pw_engines.tensorrt.plan_file import read_facts, split_plan
from pw_engines.tensorrt.request import Request
from tests.closeness import relative_l2
from tests.engines.tensorrt.segments import aligned, data, onnx_of, spec
from tests.engines.tensorrt.segments import function as segment
from tests.engines.tensorrt.simulated import FAULT, read_plan

full = torch.full
CPU = torch.device("cpu")
GPU = torch.device("cuda")
TARGETS = ("sm_89", "sm_120")


@pytest.fixture
def path(rtx_trt: Any, tmp_path: Path) -> Path:
    model, plan = tmp_path / "model.onnx", tmp_path / rtx.FILE
    model.write_bytes(onnx_of(spec()))
    request = Request(
        spec=spec(), model=model, plan=plan, device=None, library="tensorrt-rtx", targets=TARGETS
    )
    assert Request.from_json(request.to_json()) == request
    assert build_plan(request) == []
    model.unlink()
    return plan


@pytest.fixture
def ada(rtx_trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA L4", major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_the_builder_is_given_the_targets_and_its_scratch_is_kept(path: Path) -> None:
    plan = read_plan(split_plan(path.read_bytes())[0])
    assert plan["targets"] == ["SM89", "SM120"]
    assert plan["flags"] == ["REQUIRE_USER_ALLOCATION"]
    assert plan["workspace"] == rtx.RTX.workspace
    assert plan["timing cache"] is None
    assert read_facts(path).scratch == 4096


def test_a_plan_computes_what_its_segment_does(path: Path, ada: None) -> None:
    engine = rtx.load(spec(), path, CPU)
    assert engine.backend == "tensorrt-rtx"
    inputs, outputs, expected = data(spec())
    engine.run(inputs, outputs)
    assert relative_l2(outputs[0], expected) < 1e-2


@pytest.mark.parametrize("tokens", [2, 7, 24])
def test_every_size_up_to_the_limit_runs_unpadded(path: Path, ada: None, tokens: int) -> None:
    engine = rtx.load(spec(), path, CPU)
    assert not engine.padded
    for count in (24, tokens, 24):  # the context's sizes follow the calls
        sized = spec(tokens=count)
        inputs, outputs, expected = data(sized, seed=count)
        engine.run(inputs, outputs)
        assert relative_l2(outputs[0], expected) < 1e-2
    with pytest.raises(ValueError, match="tokens from 2 to 24"):
        engine.run(*data(spec(tokens=25))[:2])


def test_kernels_finished_at_the_first_run_are_kept_for_the_next(
    path: Path, ada: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "DRIVER", tmp_path / "absent")
    cache = path.with_name("runtime-NVIDIA-L4-unknown.cache")
    random_inputs = engine_module.random_inputs
    monkeypatch.setattr(
        engine_module, "random_inputs", lambda *given: list(map(aligned, random_inputs(*given)))
    )
    monkeypatch.setattr(torch, "full", lambda *given, **named: aligned(full(*given, **named)))

    def opened() -> TensorrtEngine:
        engine = rtx.load(spec(), path, CPU)
        rtx.check_first_run(engine, segment, CPU)
        return engine

    assert not opened().kernels.loaded  # type: ignore[union-attr]
    assert cache.read_bytes().startswith(b"kernels of")
    assert opened().kernels.loaded  # type: ignore[union-attr]
    cache.write_bytes(b"of another driver")
    assert not opened().kernels.loaded  # type: ignore[union-attr]
    assert cache.read_bytes().startswith(b"kernels of")
    assert sorted(file.name for file in tmp_path.iterdir()) == [rtx.FILE, cache.name]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path, patch: path.write_bytes(b"no plan"), "it is damaged"),
        (lambda path, patch: patch.setenv(FAULT, "other gpu"), "it was built for other GPUs"),
    ],
)
def test_a_plan_that_cannot_be_used_here_says_why(
    path: Path,
    ada: None,
    spoil: Callable[[Path, pytest.MonkeyPatch], object],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(path, monkeypatch)
    with pytest.raises(EngineError, match=f"cannot be used on this device: {reason}; build it"):
        rtx.load(spec(), path, CPU)


def test_a_gpu_finds_plans_for_its_target_the_fewest_first(ada: None) -> None:
    found = [dict(platform)["targets"] for platform in rtx.platforms_for(GPU)]
    assert len(found) == len(set(found)) == 16
    assert found[0] == "sm_89"
    assert found[-1] == "sm_80 sm_86 sm_89 sm_120 sm_121"
    assert all("sm_89" in targets.split() for targets in found)


def test_gpus_without_the_library_are_told(rtx_trt: Any) -> None:
    assert rtx.cannot_run(CPU) == "TensorRT for RTX runs on NVIDIA GPUs, got the device cpu"
    assert rtx.cannot_run(GPU) == "TensorRT for RTX does not run on this GPU (sm_90)"
