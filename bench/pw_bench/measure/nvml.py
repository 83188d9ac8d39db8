# SPDX-License-Identifier: Apache-2.0
"""What NVIDIA's management library says of a GPU; on a machine without it, why it says nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pw_bench.results import GpuState


class Nvml:
    """One GPU.

    Attributes:
        reason: why nothing can be read; empty where it can.
    """

    def __init__(self, index: int = 0) -> None:
        """The one that torch calls cuda:`index`, where CUDA_DEVICE_ORDER is PCI_BUS_ID or all GPUs
        are alike. Never fails: what is missing is said in `reason`."""
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
            names = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
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
        """Clocks, power and temperature now; None where nothing can be read."""
        if self._handle is None:
            return None
        ml, gpu = self._nvml, self._handle
        power = self._ask(lambda: ml.nvmlDeviceGetPowerUsage(gpu))
        limit = self._ask(lambda: ml.nvmlDeviceGetEnforcedPowerLimit(gpu))
        return GpuState(
            sm_clock_mhz=self._ask(lambda: ml.nvmlDeviceGetClockInfo(gpu, ml.NVML_CLOCK_SM)),
            memory_clock_mhz=self._ask(lambda: ml.nvmlDeviceGetClockInfo(gpu, ml.NVML_CLOCK_MEM)),
            power_w=None if power is None else power / 1e3,
            power_limit_w=None if limit is None else limit / 1e3,
            temperature_c=self._ask(
                lambda: ml.nvmlDeviceGetTemperature(gpu, ml.NVML_TEMPERATURE_GPU)
            ),
        )

    def joules(self) -> float | None:
        """Energy since the driver was loaded; differences of it are that of a run."""
        if self._handle is None:
            return None
        used = self._ask(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return None if used is None else used / 1e3

    def memory_of(self, pid: int) -> int | None:
        """Bytes of the GPU that a process holds; None before it holds any. Those of all processes,
        and the reason, where they are not told apart, as in containers, whose process numbers are
        others than the driver's: this process must hold some for that to be seen."""
        if self._handle is None:
            return None
        ml = self._nvml
        running = self._ask(lambda: ml.nvmlDeviceGetComputeRunningProcesses(self._handle)) or ()
        held = {one.pid: one.usedGpuMemory for one in running}
        if held.get(pid) is not None:
            return int(held[pid])
        if held.get(os.getpid()) is not None:
            return None
        self.reason = self.reason or "NVML gives the memory of all processes, not of each"
        used = self._ask(lambda: ml.nvmlDeviceGetMemoryInfo(self._handle).used)
        return None if used is None else int(used)

    def _ask(self, question: Callable[[], Any]) -> Any:
        """An answer; None, and the reason, where the driver refuses this one."""
        try:
            return question()
        except self._nvml.NVMLError as error:
            self.reason = self.reason or f"NVML says: {error}"
            return None
