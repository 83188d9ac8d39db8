# SPDX-License-Identifier: Apache-2.0
"""Figures of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import TYPE_CHECKING, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

if TYPE_CHECKING:
    from pw_runtime.server.worker_process import WorkerProcess

BUCKETS: Final = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)  # seconds
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_STATES: Final = ("queued", "in_progress", "completed", "failed")


class Metrics:
    """Counters of what happened, and gauges that are read when somebody asks."""

    def __init__(
        self,
        counts: Callable[[], dict[str, int]],
        listeners: Sized,
        workers: Sequence[WorkerProcess],
    ) -> None:
        self._registry = CollectorRegistry()
        self._counts, self._listeners, self._workers = counts, listeners, workers
        ProcessCollector(registry=self._registry)
        self._jobs = self._gauge("pw_jobs", "Jobs in each state", "status")
        self._streams = self._gauge("pw_event_streams", "Open event streams")
        self._ready = self._gauge("pw_worker_ready", "1 where the worker can make jobs", "device")
        self._rss = self._gauge("pw_worker_memory_bytes", "Host memory of the worker", "device")
        self._ended = Counter(
            "pw_jobs_ended", "Jobs by their end", ["end"], registry=self._registry
        )
        self.restarts = Counter(
            "pw_worker_restarts", "Workers that ended by themselves", registry=self._registry
        )
        self.stage_seconds = Histogram(
            "pw_stage_seconds",
            "Time of each stage of a job",
            ["stage"],
            buckets=BUCKETS,
            registry=self._registry,
        )

    def ended(self, code: str | None) -> None:
        """Count the end of a job; no code means that its clip is complete."""
        self._ended.labels(code or "completed").inc()

    def text(self) -> bytes:
        """Return all figures as they are now."""
        counts = self._counts()
        for status in _STATES:
            self._jobs.labels(status).set(counts.get(status, 0))
        self._streams.set(len(self._listeners))
        for worker in self._workers:
            self._ready.labels(worker.device).set(worker.ready is not None)
            self._rss.labels(worker.device).set(worker.rss)
        return generate_latest(self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry)
