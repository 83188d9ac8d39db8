# SPDX-License-Identifier: Apache-2.0
"""NVML, played by a fake driver."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from pw_bench.measure.nvml import Nvml


def test_missing_or_denied_nvml_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    missing = Nvml()
    assert "not installed" in missing.reason
    assert missing.state() is missing.joules() is missing.memory_of(1) is None

    class NVMLError(Exception):
        pass

    def deny() -> None:
        raise NVMLError("Insufficient Permissions")

    denied = SimpleNamespace(NVMLError=NVMLError, nvmlInit=deny)
    monkeypatch.setitem(sys.modules, "pynvml", denied)
    assert Nvml().reason == "NVML says: Insufficient Permissions"


def test_one_denied_query_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def deny(*arguments: object) -> None:
        raise NVMLError("Not Supported")

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: "gpu",
        nvmlDeviceGetPowerUsage=lambda gpu: 350_000,
        nvmlDeviceGetEnforcedPowerLimit=deny,
        nvmlDeviceGetClockInfo=lambda gpu, clock: 1000 * clock,
        nvmlDeviceGetTemperature=lambda gpu, sensor: 50,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: 5_000,
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: [
            SimpleNamespace(pid=7, usedGpuMemory=123)
        ],
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=456),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml()
    state = nvml.state()
    assert state is not None
    assert (state.power_w, state.power_limit_w, state.memory_clock_mhz) == (350.0, None, 2000)
    assert nvml.joules() == 5.0
    assert nvml.reason == "NVML says: Not Supported"


def processes(monkeypatch: pytest.MonkeyPatch, *pids: int) -> list[object]:
    """Install a driver that lists these processes; return the GPUs that are opened."""
    opened: list[object] = []
    fake = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=opened.append,
        nvmlDeviceGetHandleByUUID=opened.append,
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: [
            SimpleNamespace(pid=pid, usedGpuMemory=123) for pid in pids
        ],
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=456),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return opened


def test_process_without_gpu_memory_does_not_get_that_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes(monkeypatch, os.getpid(), 7)
    nvml = Nvml()
    nvml._handle = "gpu"
    assert (nvml.memory_of(7), nvml.memory_of(8)) == (123, None)
    assert nvml.reason == ""


def test_memory_of_all_processes_is_marked_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    processes(monkeypatch, 7)  # numbers of the host, in a container
    nvml = Nvml()
    nvml._handle = "gpu"
    assert nvml.memory_of(8) == 456
    assert "all processes" in nvml.reason


def test_nvml_opens_the_gpu_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = processes(monkeypatch)
    Nvml(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    Nvml(0)
    Nvml(1)
    assert opened == [1, 3, "GPU-ab"]
