# SPDX-License-Identifier: Apache-2.0
"""Facts about the machine: memory of the process, GPUs, the driver."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pw_runtime.system import machine
from pw_runtime.system.machine import Gpu, peak_rss_bytes, reset_peak_rss


def test_peak_memory_sees_a_large_block_and_forgets_it_after_reset() -> None:
    size = 256 * 2**20
    before = peak_rss_bytes()
    block = bytearray(b"x") * size
    assert peak_rss_bytes() >= before
    assert peak_rss_bytes() >= size
    with_block = peak_rss_bytes()
    del block
    if not reset_peak_rss():
        pytest.skip("this system cannot reset a process's memory peak")
    assert peak_rss_bytes() <= with_block - size // 2


def test_peak_memory_without_proc_comes_from_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = peak_rss_bytes()
    monkeypatch.setattr(machine, "_proc_field", lambda path, name: None)
    assert peak_rss_bytes() >= exact * 0.9


def test_gpus_and_driver_come_from_torch_and_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150_000_000_000, major=9, minor=0)
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda i: card
    )
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.65",
    )
    modules = {"torch": SimpleNamespace(cuda=cuda), "pynvml": nvml}
    monkeypatch.setattr("importlib.import_module", modules.__getitem__)
    gpu = Gpu(name="NVIDIA H200", memory_bytes=150_000_000_000, capability="9.0")
    assert machine._gpus() == (gpu, gpu)
    assert machine._driver() == "580.65"


def test_nvml_without_a_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    nvml = SimpleNamespace(NVMLError=RuntimeError, nvmlInit=no_library)
    monkeypatch.setattr("importlib.import_module", lambda name: nvml)
    assert machine._driver() is None
