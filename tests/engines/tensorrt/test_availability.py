# SPDX-License-Identifier: Apache-2.0
"""Where TensorRT cannot be used, the reason and the remedy are reported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pw_engines import tensorrt
from pw_engines.engine import EngineError
from pw_engines.tensorrt import driver
from pw_engines.tensorrt.library import bindings
from tests.engines.tensorrt.streams import Cuda

GPU = torch.device("cuda")


def test_other_devices_are_refused() -> None:
    reason = tensorrt.unavailable(torch.device("cpu"))
    assert reason == "TensorRT runs on NVIDIA GPUs, got the device cpu: use --device cuda"


def test_a_machine_without_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable NVIDIA GPU: install a driver" in str(tensorrt.unavailable(GPU))


def test_a_missing_package_is_named_with_its_remedy(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    reason = str(tensorrt.unavailable(GPU))
    assert reason.startswith("TensorRT cannot be imported (")
    assert reason.endswith('pip install "pixelwizard-runtime[tensorrt]"')


@pytest.mark.parametrize("version", ["8.6.1", "10.7.0.23", "12.0.1.2"])
def test_other_versions_are_refused(
    version: str, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "__version__", version)
    reason = f"TensorRT {version} is installed, expected >=10.8,<12: pip install"
    assert str(tensorrt.unavailable(GPU)).startswith(reason)
    with pytest.raises(EngineError, match=r"expected >=10\.8,<12"):
        bindings()


@pytest.mark.parametrize("version", ["10.8.0.43", "10.16.1.11", "11.0.0.114", "11.4.0.106"])
def test_versions_we_know_are_taken(version: str, simulate: Callable[[str], Any]) -> None:
    simulate(version)
    assert tensorrt.unavailable(GPU) is None


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 06:55:42 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.65.06  Release Build",
    ],
)
def test_platform_is_what_a_plan_depends_on(
    line: str, trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "DRIVER", tmp_path / "version")
    assert "driver" not in dict(tensorrt.tensorrt_platform(GPU))
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    facts = dict(tensorrt.tensorrt_platform(GPU))
    assert facts["driver"] == "580.65.06"
    assert facts["tensorrt"] == trt.__version__
    assert facts["gpu"] == "Simulated H200"
    assert facts["capability"] == "9.0"
    assert facts.keys() == {"capability", "driver", "gpu", "machine", "recipe", "tensorrt", "torch"}
