# SPDX-License-Identifier: Apache-2.0
"""State of a GPU according to NVIDIA's management library, or the reason why there is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from pw_bench.results import GpuState, Skipped


class Nvml:
    """One GPU.

    Attributes:
        reason: why nothing can be read; empty where it can.
    """

    def __init__(self, index: int = 0) -> None:
        """Open the GPU that torch calls cuda:`index`; failures go to `reason`, nothing is raised.

        The index is that of torch where CUDA_DEVICE_ORDER is PCI_BUS_ID or all GPUs are alike.
        """
        self.reason = ""
        self._handle: Any = None
        try:
            import pynvml
        except ImportError:
            self.reason = "nvidia-ml-py is not installed: pip install 'pixelwizard-runtime[cuda]'"
            return
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            names = [name for name in visible.split(",") if name]
            name = names[index] if index < len(names) else str(index)
            by_name = name.startswith(("GPU-", "MIG-"))
            self._handle = (
                pynvml.nvmlDeviceGetHandleByUUID(name)
                if by_name
                else pynvml.nvmlDeviceGetHandleByIndex(int(name))
            )
        except (pynvml.NVMLError, ValueError) as error:
            self.reason = f"NVML says: {error}"

    def state(self) -> GpuState | None:
        """Return clocks, power and temperature now; None where nothing can be read."""
        if self._handle is None:
            return None
        ml, gpu = self._nvml, self._handle
        power = self._query(lambda: ml.nvmlDeviceGetPowerUsage(gpu))
        limit = self._query(lambda: ml.nvmlDeviceGetEnforcedPowerLimit(gpu))
        return GpuState(
            sm_clock_mhz=self._query(lambda: ml.nvmlDeviceGetClockInfo(gpu, ml.NVML_CLOCK_SM)),
            memory_clock_mhz=self._query(lambda: ml.nvmlDeviceGetClockInfo(gpu, ml.NVML_CLOCK_MEM)),
            power_w=None if power is None else power / 1e3,
            power_limit_w=None if limit is None else limit / 1e3,
            temperature_c=self._query(
                lambda: ml.nvmlDeviceGetTemperature(gpu, ml.NVML_TEMPERATURE_GPU)
            ),
        )

    def joules(self) -> float | None:
        """Return the energy used since the driver was loaded; a run's energy is a difference."""
        if self._handle is None:
            return None
        used = self._query(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return None if used is None else used / 1e3

    def memory_of(self, pid: int) -> int | None:
        """Return the GPU bytes that a process holds; None before it holds any.

        In a container, process numbers differ from the driver's: if this process holds GPU memory
        and the driver does not list it, the bytes of all processes are returned, and `reason` says
        so.
        """
        if self._handle is None:
            return None
        ml = self._nvml
        running = self._query(lambda: ml.nvmlDeviceGetComputeRunningProcesses(self._handle)) or ()
        held = {process.pid: process.usedGpuMemory for process in running}
        if held.get(pid) is not None:
            return int(held[pid])
        if held.get(os.getpid()) is not None:
            return None
        self.reason = self.reason or "NVML gives the memory of all processes, not of each"
        used = self._query(lambda: ml.nvmlDeviceGetMemoryInfo(self._handle).used)
        return None if used is None else int(used)

    def _query(self, question: Callable[[], Any]) -> Any:
        """Ask the driver; None where it refuses this question, and `reason` says why."""
        try:
            return question()
        except self._nvml.NVMLError as error:
            self.reason = self.reason or f"NVML says: {error}"
            return None


def skipped_without_gpu(device: torch.device) -> list[Skipped]:
    """Return the part of a result that a device without NVML skips."""
    if device.type == "cuda":
        return []
    return [Skipped(part="memory, power and energy by NVML", reason="no CUDA GPU")]
