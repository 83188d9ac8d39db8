# SPDX-License-Identifier: Apache-2.0
"""The memory and the CPU time of another process over time."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from types import TracebackType

from pw_bench.measure.nvml import Nvml

INTERVAL = 0.05  # seconds between samples
# Samples of RSS between two of PSS, for which the kernel walks all pages of the process: for a
# process of 2 GB, four a second took a tenth of a core, one every two seconds a hundredth.
PSS_EVERY = 40


class MemorySampler:
    """Samples a process from outside, from the start to the end of the block.

    Attributes:
        host: (time.perf_counter, resident bytes).
        cpu: (time.perf_counter, seconds of CPU time of all its threads so far).
        pss: (time.perf_counter, proportional set size in bytes: shared pages are divided).
        device: (time.perf_counter, GPU bytes).
    """

    def __init__(self, pid: int, nvml: Nvml | None) -> None:
        """Sample host memory, and GPU memory where `nvml` is given."""
        self.host: list[tuple[float, int]] = []
        self.cpu: list[tuple[float, float]] = []
        self.pss: list[tuple[float, int]] = []
        self.device: list[tuple[float, int]] = []
        self._pid, self._nvml = pid, nvml
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pw-memory-sampler")

    def __enter__(self) -> MemorySampler:
        """Start sampling."""
        self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop sampling, even if the process is still running."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        count = 0
        while True:
            now = time.perf_counter()
            rss = _proc_bytes(self._pid, "status", "VmRSS")
            if rss is not None:
                self.host.append((now, rss))
            cpu = _cpu_seconds(self._pid)
            if cpu is not None:
                self.cpu.append((now, cpu))
            if count % PSS_EVERY == 0:
                pss = _proc_bytes(self._pid, "smaps_rollup", "Pss")
                if pss is not None:
                    self.pss.append((now, pss))
            held = self._nvml.memory_of(self._pid) if self._nvml is not None else None
            if held is not None:
                self.device.append((now, held))
            count += 1
            if self._stop.wait(INTERVAL):
                return


def _proc_bytes(pid: int, file: str, field: str) -> int | None:
    """Read a field of /proc in bytes; None where the process or the file is gone."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _cpu_seconds(pid: int) -> float | None:
    """Return the CPU time of a process; None where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may have spaces
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system


def between(
    samples: list[tuple[float, int]], start: float, end: float
) -> tuple[tuple[float, int], ...]:
    """Return the samples within [start, end], in seconds since `start`."""
    return tuple((round(t - start, 3), size) for t, size in samples if start <= t <= end)
