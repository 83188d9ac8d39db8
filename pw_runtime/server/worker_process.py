# SPDX-License-Identifier: Apache-2.0
"""The server's end of one worker: starts it, gives it jobs, hears it, starts it again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from typing import Final, Protocol

from pw_runtime.server.messages import (
    Advanced,
    Cancel,
    Ceased,
    Drafted,
    Event,
    Failed,
    Fit,
    Join,
    Made,
    Make,
    Order,
    Ready,
    Refused,
    Undrafted,
    order_line,
    read_event,
)
from pw_runtime.server.settings import Settings
from pw_runtime.server.store import Job

LONGEST_BACKOFF: Final = 60.0  # seconds
LONGEST_LINE: Final = 2**20  # bytes
WAKE: Final = object()
AboutJob = Advanced | Drafted | Undrafted | Made | Failed | Ceased


class Foreman(Protocol):
    """The one who gives a worker its jobs, and hears what becomes of them."""

    async def next_job(self, worker: WorkerProcess) -> Job | None:
        """Take the next job of the queue that is not for another worker."""

    def order_for(self, job: Job) -> Make:
        """Return the order to make a job."""

    async def heard(self, job: Job, event: Event, worker: WorkerProcess) -> None:
        """Take in what a worker said about its job."""

    async def died(self, job: Job | None, worker: WorkerProcess, reason: str) -> None:
        """Take in that a worker ended, in the midst of a job or between two."""

    def state_changed(self) -> None:
        """Take in that a worker became ready, or ended."""


class WorkerProcess:
    """One device's worker, from the server's start to its end.

    Attributes:
        ready: what it said when it became ready; None while it is not.
        refusal: why it cannot work; None where it can, or is about to say so.
        trouble: why it is not ready.
        job: that it makes now.
        rss: its memory in bytes, when it last said so.
        starts: number of times it was started.
    """

    def __init__(self, settings: Settings, device: str, foreman: Foreman) -> None:
        self.device = device
        self.ready: Ready | None = None
        self.refusal: str | None = None
        self.trouble = "the model is being loaded"
        self.job: Job | None = None
        self.rss = 0
        self.starts = 0
        self._settings, self._foreman = settings, foreman
        self._process: asyncio.subprocess.Process | None = None
        self._inbox: asyncio.Queue[Event | object | None] = asyncio.Queue()
        self._stopping = asyncio.Event()
        self._was_mute = False  # its last process ended before it was ready

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None where none runs."""
        return self._process.pid if self._process is not None else None

    @property
    def starting(self) -> bool:
        """Tell whether it has yet to say which presets fit, or that it cannot work.

        After a start that ended without a word it counts as starting only when it is ready again.
        """
        return self.ready is None and self.refusal is None and not self._was_mute

    @property
    def fits(self) -> dict[str, Fit]:
        """The planner's word on every preset."""
        return dict(self.ready.presets) if self.ready is not None else {}

    def wake(self) -> None:
        """Tell it that there may be a job."""
        if self.job is None and self.ready is not None:
            self._inbox.put_nowait(WAKE)

    def cancel(self, job_id: str) -> None:
        """Ask for the end of a job, if it is the one in hand; kill a worker that does not hear."""
        job = self.job
        if job is not None and job.id == job_id:
            self._send(Cancel(job=job_id))
            loop = asyncio.get_running_loop()
            loop.call_later(self._settings.hang_seconds, self._kill_if_deaf, job)

    def _kill_if_deaf(self, job: Job) -> None:
        if self.job is job:
            self.kill()

    def stop(self) -> None:
        """Ask the worker to end; what its job has is kept."""
        self._stopping.set()
        self._inbox.put_nowait(WAKE)
        self._end_orders()

    async def run(self) -> None:
        """Keep a worker running until `stop`. Raises nothing that a worker does."""
        wait = self._settings.backoff_seconds
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                made_something, reason = await self._life()
            except Exception as error:  # of ours: the next worker may do better than none
                traceback.print_exc()
                made_something, reason = False, f"{type(error).__name__}: {error}"
            self._was_mute = self.ready is None
            job, self.job, self.ready = self.job, None, None
            self.trouble = self.refusal or f"the worker ended ({reason}) and is started again"
            self._foreman.state_changed()
            if self._stopping.is_set():
                break
            await self._foreman.died(job, self, reason)
            if made_something or time.monotonic() - began > LONGEST_BACKOFF:
                wait = self._settings.backoff_seconds
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait)
            wait = min(2 * wait, LONGEST_BACKOFF)

    async def _life(self) -> tuple[bool, str]:
        """Run one process to its end; return whether it ended a job, and how it ended."""
        self.starts += 1
        self._inbox = asyncio.Queue()
        command = (*self._settings.worker, str(os.getpid()))
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LONGEST_LINE,
                start_new_session=True,  # Ctrl-C is for the server, which tells its workers
            )
        except OSError as error:
            return False, f"it cannot be started: {error}"
        reading = asyncio.create_task(self._read(self._process))
        settings = self._settings
        self._send(
            Join(
                model=str(settings.model),
                presets=settings.presets,
                options=replace(settings.options, device=self.device),
                loras=settings.loras,
                gpu_memory=settings.gpu_memory,
                host_memory=settings.host_memory,
            )
        )
        if self._stopping.is_set():  # since before there was a process to tell
            self._end_orders()
        try:
            made_something = await self._converse()
        except BaseException:
            self.kill()
            raise
        finally:
            reading.cancel()
            code = await self._ended()
            self._process = None
        if self.refusal is not None:
            return made_something, self.refusal
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return made_something, how

    async def _converse(self) -> bool:
        """Give out jobs and take in events until the worker's last word."""
        made_something = False
        while True:
            idle = self.job is None and self.ready is not None and not self._stopping.is_set()
            if idle and (job := await self._foreman.next_job(self)) is not None:
                self.job = job
                self._send(self._foreman.order_for(job))
            event = await self._inbox.get()
            if event is None:
                return made_something
            if isinstance(event, Ready):
                self.ready, self.refusal, self.rss = event, None, event.rss
                self._foreman.state_changed()
            elif isinstance(event, Refused):
                self.refusal = event.reason
                self._foreman.state_changed()
            elif isinstance(event, AboutJob):
                made_something |= await self._about_job(event)

    async def _about_job(self, event: AboutJob) -> bool:
        """Take in what was said of a job; return whether it has ended."""
        job = self.job
        if job is None or event.job != job.id:
            return False
        ended = isinstance(event, Made | Failed | Ceased)
        if isinstance(event, Made | Failed | Ceased):
            self.rss = event.rss
        await self._foreman.heard(job, event, self)
        if ended:
            self.job = None
        return ended

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Turn the worker's lines into events, and its end into None."""
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                self._inbox.put_nowait(read_event(line))
        except (ValueError, OSError) as error:  # not one of ours: it cannot be relied on any more
            print(f"a worker said what no worker says: {error}", file=sys.stderr)
            with suppress(ProcessLookupError):
                process.kill()
        finally:
            self._inbox.put_nowait(None)

    def _send(self, order: Order) -> None:
        process = self._process
        if process is not None and process.stdin is not None and not process.stdin.is_closing():
            process.stdin.write(order_line(order))

    def _end_orders(self) -> None:
        """Ask the process, where there is one, to end."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    async def _ended(self) -> int:
        """Wait for the process, which has closed its output, and kill it if it stays."""
        assert self._process is not None
        try:
            return await asyncio.wait_for(self._process.wait(), self._settings.grace_seconds)
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            return await self._process.wait()

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
