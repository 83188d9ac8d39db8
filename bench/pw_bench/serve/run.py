# SPDX-License-Identifier: Apache-2.0
"""Load on `pw serve`, with a real model and clips that are computed.

    pw bench serve --model BUNDLE --preset nano --out FILE

Parts: `status`, clients that poll while a job runs, and that job beside one alone, in turns;
`streams`, many event streams on one job; `queue`, many jobs that wait, and a restart with them;
`soak`, many jobs one after the other. Clients and server share the machine.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from pw_bench.measure.environment import envelope, identify
from pw_bench.result_sections import Ratio
from pw_bench.results import Figure, Result
from pw_bench.serve.clients import Asked, listen, poll
from pw_bench.serve.server import Server, cpu_seconds, resident_bytes, serving
from pw_runtime.checkpoint.bundle import open_bundle
from pw_runtime.errors import BadResult

PARTS: Final = ("status", "streams", "queue", "soak")
POLL_SECONDS: Final = 1.0  # between two requests of a client, as the official one waits
KEPT: Final = 5000  # samples of a figure in the file, evenly over all
MEMORY_EVERY: Final = 10  # jobs
PROMPT: Final = "A big red ball drifts to the right over grass."


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Sizes of the parts."""

    clients: int = 50
    rounds: int = 5  # pairs of jobs
    streams: int = 200
    queued: int = 1000
    soak: int = 300


def measure_serve(
    model: Path, preset: str, parts: Sequence[str], load: Load, say: Callable[[str], None]
) -> Result:
    """Measure the parts, each with a server of its own.

    Raises BadRequest, BadWeights, BadResult where the server does not do what it should.
    """
    bundle = open_bundle(model)
    identity = identify(torch.device("cpu"))
    figures: list[Figure] = []
    ratios: list[Ratio] = []
    with tempfile.TemporaryDirectory() as temporary:
        for part in parts:
            bench = _Bench(model, preset, Path(temporary) / part, load, say)
            found, compared = getattr(bench, part)()
            figures += found
            ratios += compared
    scope = {
        "words": "`pw serve` and its clients on one machine",
        "preset": preset,
        "parts": ", ".join(parts),
        "clients": f"{load.clients}, streams: {load.streams}, queued: {load.queued}",
        "soak": f"{load.soak} jobs",
    }
    identity = replace(identity, weights={model.name: f"sha256:{bundle.digest}"})
    return replace(envelope("serve", scope, identity), figures=tuple(figures), ratios=tuple(ratios))


Found = tuple[list[Figure], list[Ratio]]


@dataclass(frozen=True, slots=True)
class _Bench:
    """The parts, with their servers."""

    model: Path
    preset: str
    root: Path
    load: Load
    say: Callable[[str], None]

    def status(self) -> Found:
        """Time status requests while jobs run, and jobs with and without them."""
        n = self.load.clients
        jobs: dict[str, list[float]] = {"alone": [], "polled": []}
        cpu: dict[str, list[float]] = {"alone": [], "polled": []}
        paced = Asked()
        with self._serving() as server:
            self._job(server, clients=0, pause=0)  # loads the model
            for number in range(self.load.rounds):
                for kind, clients in (("alone", 0), ("polled", n)):
                    before = cpu_seconds(server.worker)
                    seconds, asked = self._job(server, clients=clients, pause=POLL_SECONDS)
                    jobs[kind].append(seconds)
                    cpu[kind].append(cpu_seconds(server.worker) - before)
                    paced.seconds += asked.seconds
                self.say(
                    f"round {number + 1}: alone {jobs['alone'][-1]:.2f} s, "
                    f"polled {jobs['polled'][-1]:.2f} s"
                )
            _, busy = self._job(server, clients=n, pause=0)
        rate = len(busy.seconds) / busy.wall
        self.say(
            f"{n} clients without a pause: {rate:.0f} requests a second, p99 {_p99(busy)}; "
            f"once a second: p99 {_p99(paced)}"
        )
        figures = [
            _figure(f"status, {n} clients once a second/time of an answer", "s", paced.seconds),
            _figure(f"status, {n} clients without a pause/time of an answer", "s", busy.seconds),
            _figure(f"status, {n} clients without a pause/time per answer", "s", [1 / rate]),
            *(_figure(f"job, {kind}/time", "s", values) for kind, values in jobs.items()),
            *(_figure(f"job, {kind}/CPU time", "s", values) for kind, values in cpu.items()),
        ]
        ratio = Ratio(
            side="job, polled",
            against="job, alone",
            time=_times_as_fast(jobs["polled"], jobs["alone"]),
            cpu_time=_times_as_fast(cpu["polled"], cpu["alone"]),
        )
        return figures, [ratio]

    def streams(self) -> Found:
        """Let many streams follow a job to its end."""
        n = self.load.streams
        with self._serving() as server:
            before = resident_bytes(server.pid)
            used = cpu_seconds(server.pid)
            video_id = self._submit(server)
            ends = asyncio.run(listen(server.url, f"/v1/videos/{video_id}/events", n))
            used = cpu_seconds(server.pid) - used
            after = resident_bytes(server.pid)
        spread = max(ends) - min(ends)
        self.say(f"{n} streams: all had the end within {spread:.3f} s, CPU {used:.2f} s")
        return [
            _figure(f"{n} streams/from the first to the last that had the end", "s", [spread]),
            _figure(f"{n} streams/CPU time of the server", "s", [used]),
            _figure(f"{n} streams/process memory before", "B", [before]),
            _figure(f"{n} streams/process memory after", "B", [after]),
        ], []

    def queue(self) -> Found:
        """Queue many jobs, and start the server again with them."""
        n, times = self.load.queued, []
        with self._serving() as server:
            before = resident_bytes(server.pid)
            for number in range(n):
                start = time.perf_counter()
                self._submit(server, seed=number)
                times.append(time.perf_counter() - start)
            after = resident_bytes(server.pid)
        start = time.perf_counter()
        with self._serving() as server:
            ready = time.perf_counter() - start
            again = resident_bytes(server.pid)
            found = self._count(server)
        if found != n:
            raise BadResult("jobs were lost by a restart", got=str(found), wanted=str(n))
        self.say(f"{n} jobs: memory {before >> 20} -> {after >> 20} MiB, {again >> 20} restarted")
        return [
            _figure(f"{n} queued/time of a submission", "s", times),
            _figure(f"{n} queued/time of a restart", "s", [ready]),
            _figure(f"{n} queued/process memory before", "B", [before]),
            _figure(f"{n} queued/process memory after", "B", [after]),
            _figure(f"{n} queued/process memory restarted", "B", [again]),
        ], []

    def soak(self) -> Found:
        """Make many jobs one after the other, and sample the memory of both processes."""
        memory: dict[str, list[float]] = {"server": [], "worker": []}
        seconds = []
        with self._serving() as server:
            for number in range(self.load.soak):
                job_seconds, _ = self._job(server, clients=0, pause=0, seed=number)
                seconds.append(job_seconds)
                if number % MEMORY_EVERY == 0 or number == self.load.soak - 1:
                    memory["server"].append(resident_bytes(server.pid))
                    memory["worker"].append(resident_bytes(server.worker))
                    sizes = ", ".join(f"{n} {int(v[-1]) >> 20} MiB" for n, v in memory.items())
                    self.say(f"job {number + 1}: {sizes}")
        return [
            _figure("soak/time of a job", "s", seconds),
            *(_figure(f"soak/process memory, {n}", "B", v) for n, v in memory.items()),
        ], []

    def _serving(self) -> Any:
        return serving(self.model, self.preset, self.root)

    def _submit(self, server: Server, seed: int = 0) -> str:
        body = {"prompt": PROMPT, "preset": Path(self.preset).stem, "seed": seed}
        return str(server.ask("/v1/videos", body)["id"])

    def _job(
        self, server: Server, *, clients: int, pause: float, seed: int = 0
    ) -> tuple[float, Asked]:
        """Make a job while clients ask for its state; return its seconds, and theirs."""
        video_id = self._submit(server, seed)
        path = f"/v1/videos/{video_id}"

        async def run() -> Asked:
            end = asyncio.create_task(listen(server.url, f"{path}/events", 1))
            try:
                return await poll(server.url, path, clients, pause, end.done)
            finally:
                await end

        asked = asyncio.run(run())
        return server.job_seconds(video_id), asked

    def _count(self, server: Server) -> int:
        """Count all jobs, page by page."""
        found, after = 0, ""
        while True:
            page = server.ask(f"/v1/videos?limit=100{after}")
            found += len(page["data"])
            if not page["has_more"]:
                return found
            after = f"&after={page['last_id']}"


def _figure(name: str, unit: Any, samples: Sequence[float]) -> Figure:
    """Return a figure with at most KEPT of the samples."""
    step = -(-len(samples) // KEPT)
    return Figure(name=name, unit=unit, samples=tuple(samples[::step]))


def _times_as_fast(side: Sequence[float], against: Sequence[float]) -> float:
    """Return how many times as fast a side is, by the median of all pairs."""
    return statistics.median(b / a for a, b in zip(side, against, strict=True))


def _p99(asked: Asked) -> str:
    if len(asked.seconds) < 2:
        return "unknown"
    return f"{1000 * statistics.quantiles(asked.seconds, n=100, method='inclusive')[98]:.1f} ms"
