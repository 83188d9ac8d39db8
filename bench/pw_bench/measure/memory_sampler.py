# SPDX-License-Identifier: Apache-2.0
"""The memory of another process over time."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from types import TracebackType

from pw_bench.measure.nvml import Nvml

INTERVAL = 0.05  # seconds between samples
# Samples between two of PSS, for which the kernel walks all pages of the process: every quarter of
# a second that took a tenth of a core for a process of 2 GB, a hundredth every two seconds.
PSS_EVERY = 40


class Watch:
    """Samples a process from outside, from its beginning to the end of the block.

    Attributes:
        host: (time.perf_counter, resident bytes).
        pss: (time.perf_counter, its share of resident bytes, shared pages divided).
        device: (time.perf_counter, bytes of the GPU).
    """

    def __init__(self, pid: int, nvml: Nvml | None) -> None:
        """Of a process, and what it holds of the GPU where there is one."""
        self.host: list[tuple[float, int]] = []
        self.pss: list[tuple[float, int]] = []
        self.device: list[tuple[float, int]] = []
        self._pid, self._nvml = pid, nvml
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pw-watch")

    def __enter__(self) -> Watch:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End, also where the process goes on."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        count = 0
        while True:
            now = time.perf_counter()
            rss = _field(self._pid, "status", "VmRSS")
            if rss is not None:
                self.host.append((now, rss))
            if count % PSS_EVERY == 0:
                pss = _field(self._pid, "smaps_rollup", "Pss")
                if pss is not None:
                    self.pss.append((now, pss))
            held = self._nvml.memory_of(self._pid) if self._nvml is not None else None
            if held is not None:
                self.device.append((now, held))
            count += 1
            if self._over.wait(INTERVAL):
                return


def _field(pid: int, file: str, name: str) -> int | None:
    """Bytes by name out of /proc; None where the process or the file is gone."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text()
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def between(
    samples: list[tuple[float, int]], start: float, end: float
) -> tuple[tuple[float, int], ...]:
    """Those of a time, in seconds from its start."""
    return tuple((round(t - start, 3), size) for t, size in samples if start <= t <= end)
