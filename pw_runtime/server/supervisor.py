# SPDX-License-Identifier: Apache-2.0
"""Jobs on their way: from the queue to a worker, to their end, and out of the folder again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeVar

from sqlalchemy.exc import OperationalError

from pw_runtime.server import files
from pw_runtime.server.disk_room import DiskRoom
from pw_runtime.server.hub import Hub
from pw_runtime.server.messages import (
    Advanced,
    Ceased,
    Drafted,
    Event,
    Failed,
    Fit,
    Made,
    Make,
    Undrafted,
)
from pw_runtime.server.metrics import Metrics
from pw_runtime.server.retention import expired
from pw_runtime.server.settings import Settings
from pw_runtime.server.store import Job, NewJob, Store
from pw_runtime.server.video import Video, preset_of, video_of
from pw_runtime.server.worker_process import WorkerProcess

MOST_ATTEMPTS: Final = 3  # at one job, that end with its worker or with a file that is refused
RETENTION_SECONDS: Final = 60.0  # between two looks at what is too old
RETRY_SECONDS: Final = 1.0  # between two attempts to write to a disk that refuses
Written = TypeVar("Written")


@dataclass(slots=True)
class _Ending:
    """The reason for which a running job is to end, and its end."""

    code: str
    message: str
    done: asyncio.Event


class Supervisor:
    """All jobs of a server. Used in the thread of the event loop alone; the disk in others.

    Attributes:
        hub: of the event streams.
        workers: one for each device.
        failure: the reason why the server cannot begin; None where it can.
        first_word: set when a worker is ready, or none can work.
        changed: set whenever a worker became ready, or ended.
    """

    def __init__(self, settings: Settings, store: Store, say: Callable[[str], None]) -> None:
        self.hub = Hub(self._rendered, settings.limits.listeners)
        self.workers = [WorkerProcess(settings, name, self) for name in settings.devices]
        self.metrics = Metrics(store.counts, self.hub, self.workers)
        self.failure: str | None = None
        self._settings, self._store, self._say = settings, store, say
        self._room = DiskRoom(settings.root, settings.backoff_seconds, say, self.state_changed)
        self._advanced: dict[str, Advanced] = {}
        self._stage_began: dict[str, float] = {}
        self._ending: dict[str, _Ending] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._was_ready = False
        self.first_word, self.changed = asyncio.Event(), asyncio.Event()

    # ---- from start to end

    async def start(self) -> None:
        """Let jobs that were in progress wait again, and start the workers."""
        for job in await asyncio.to_thread(self._store.with_status, "in_progress"):
            await asyncio.to_thread(self._store.requeue, job.id)
            self._say(f"{job.id} goes on where it was")
        for job in await asyncio.to_thread(self._store.being_removed):
            await self._erase(job.id)
        accepted = await asyncio.to_thread(self._store.ids)
        for job_id in await asyncio.to_thread(files.never_accepted, self._settings.root, accepted):
            await self._erase(job_id)
        self._tasks = [asyncio.create_task(worker.run()) for worker in self.workers]
        self._tasks.append(asyncio.create_task(self._retain()))
        self._tasks.append(asyncio.create_task(self._room.watch()))

    async def stop(self) -> None:
        """End the workers, which keep what their jobs have, and all streams."""
        self.hub.close()
        for worker in self.workers:
            worker.stop()
        running = self._tasks[: len(self.workers)]
        if running:
            _, late = await asyncio.wait(running, timeout=self._settings.grace_seconds)
            for worker in self.workers if late else ():
                worker.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def fits(self) -> dict[str, Fit]:
        """The planner's word on every preset; a preset fits where a worker can make it.

        While a worker starts, a preset that fits none of the others has no word yet.
        """
        found: dict[str, Fit] = {}
        for worker in self.workers:
            for name, fit in worker.fits.items():
                known = found.get(name)
                if known is None or fit.fits or (fit.draft_fits and not known.fits):
                    found[name] = fit
        if any(worker.starting for worker in self.workers):
            return {name: fit for name, fit in found.items() if fit.fits}
        return found

    @property
    def trouble(self) -> str | None:
        """The reason why no job would be begun; None where one would."""
        if any(worker.ready is not None for worker in self.workers):
            return self._room.trouble
        return self.workers[0].trouble

    # ---- what clients ask for

    async def submit(self, jobs: Sequence[NewJob], picture: bytes | None = None) -> list[Job]:
        """Queue jobs, which may start from a picture.

        Raises QueueFull, KeyReused, and WriteFailed.
        """
        limits, first = self._settings.limits, jobs[0]
        bounds = {"most": limits.queued, "most_of_client": limits.queued_per_client}
        added: list[Job] = []
        try:
            if picture is not None:  # before a worker can see the jobs
                keep = (self._settings.root, [job.id for job in jobs], picture)
                await asyncio.to_thread(files.keep_picture, *keep)
            added = await asyncio.to_thread(partial(self._store.add, jobs, **bounds))
        finally:
            if picture is not None and (not added or added[0].id != first.id):
                for job in jobs:
                    await asyncio.to_thread(files.remove, self._settings.root, job.id)
        if first.draft_id is not None and added[0].id == first.id:
            adopted = (self._settings.root, first.draft_id, first.id)
            if await asyncio.to_thread(files.adopt_draft, *adopted):
                drafted = await asyncio.to_thread(self._store.drafted, first.id)
                added = [drafted or added[0]]
        for job in added:
            self.hub.changed(job.id)
        self._wake()
        return added

    def video(self, job: Job, position: int | None = None) -> Video:
        """Describe a job; `position` is looked up where it is not given."""
        if position is None:
            position = self._store.position(job)
        return video_of(
            job,
            model=self._settings.model_name,
            advanced=self._advanced.get(job.id),
            position=position,
            keep_seconds=self._settings.limits.keep_seconds,
        )

    async def end_early(self, job_id: str, code: str, message: str, wait: float) -> None:
        """End a job that waits or runs; return when it has ended, or after `wait` seconds."""
        reason = {"code": code, "message": message}
        if await asyncio.to_thread(partial(self._store.end_queued, job_id, **reason)):
            await self._drop_unfinished(job_id)
            size = await asyncio.to_thread(files.size_of, self._settings.root, job_id)
            await asyncio.to_thread(partial(self._store.end, job_id, size=size, **reason))
            self.metrics.ended(code)
            self.hub.changed(job_id)
            return
        job = self._store.get(job_id)
        if job is not None and job.status == "queued":  # again, since it could not be ended
            await self.end_early(job_id, code, message, wait)
            return
        if job is None or job.status != "in_progress":
            return
        ending = self._ending.setdefault(job_id, _Ending(code, message, asyncio.Event()))
        for worker in self.workers:
            worker.cancel(job_id)
        with suppress(TimeoutError):
            await asyncio.wait_for(ending.done.wait(), wait)

    async def remove(self, job_id: str, wait: float) -> bool:
        """Remove a job and its files; one that runs is ended first. False where there is none."""
        if not await asyncio.to_thread(self._store.remove, job_id):
            return False
        self.hub.changed(job_id)
        worker = next((w for w in self.workers if w.job is not None and w.job.id == job_id), None)
        if worker is None:
            await self._erase(job_id)
        else:
            ending = self._ending.setdefault(job_id, _Ending("removed", "", asyncio.Event()))
            worker.cancel(job_id)
            with suppress(TimeoutError):
                await asyncio.wait_for(ending.done.wait(), wait)
        return True

    # ---- what workers ask for and say

    async def next_job(self, worker: WorkerProcess) -> Job | None:
        """Take the next job of the queue that is not for another worker; none without room."""
        if self._room.trouble is not None:
            return None
        while True:
            no_clips = self._for_others(worker, lambda fit: fit.fits)
            no_drafts = self._for_others(worker, lambda fit: fit.draft_fits)
            job = await self._stored(
                partial(self._store.claim, no_clips=no_clips, no_drafts=no_drafts)
            )
            if job is None:
                return None
            ending = self._ending.get(job.id)  # since a moment ago
            if ending is None and self._store.get(job.id) is not None:
                break
            reason = ("removed", "") if ending is None else (ending.code, ending.message)
            await self._end(job, code=reason[0], message=reason[1])
        self._advance(Advanced(job=job.id, stage="loading"))
        if (seconds := self._settings.limits.job_seconds) is not None:
            loop = asyncio.get_running_loop()
            self._timers[job.id] = loop.call_later(seconds, self._time_is_over, job.id, seconds)
        self.hub.changed(job.id)
        return job

    def _for_others(self, worker: WorkerProcess, fits: Callable[[Fit], bool]) -> set[str]:
        """Return the presets that do not fit a worker but another one, or one that is starting.

        What fits none is not left to anybody: its jobs fail, and say why.
        """
        mine = {name for name, fit in worker.fits.items() if not fits(fit)}
        others = [other for other in self.workers if other is not worker]
        if any(other.starting for other in others):
            return mine
        return {
            name
            for name in mine
            if any(name in other.fits and fits(other.fits[name]) for other in others)
        }

    def order_for(self, job: Job) -> Make:
        """Return the order to make a job."""
        return Make(
            job=job.id,
            folder=str(files.folder_of(self._settings.root, job.id)),
            prompt=job.prompt,
            negative=job.negative,
            seed=job.seed,
            preset=preset_of(job),
            draft_only=job.draft_only,
            picture=job.picture is not None,
            finishes=job.draft_id,
        )

    async def heard(self, job: Job, event: Event, worker: WorkerProcess) -> None:
        """Take in what a worker said about its job."""
        ending = self._ending.get(job.id)
        if isinstance(event, Advanced):
            self._advance(event)
        elif isinstance(event, Drafted | Undrafted):
            ready = isinstance(event, Drafted)
            await self._stored(partial(self._store.drafted, job.id, ready=ready))
        elif isinstance(event, Made):
            self._room.taken()
            await self._end(job)
        elif isinstance(event, Failed) and event.disk_full:
            self._say(f"{job.id} was refused a file: {event.reason}")
            its = await asyncio.to_thread(files.unfinished_bytes, self._settings.root, job.id)
            room = await self._room.refused(its)
            if room == "with its files":
                await self._drop_unfinished(job.id)
            await self._try_again(job, event.code, event.reason, counted=room != "none")
        elif isinstance(event, Failed):
            await self._end(job, code=event.code, message=event.reason)
        elif isinstance(event, Ceased) and ending is not None:
            await self._end(job, code=ending.code, message=ending.message)
        elif isinstance(event, Ceased):  # the server stops: it goes on at the next start
            await self._stored(partial(self._store.requeue, job.id))
            self._forget(job.id)
        self.hub.changed(job.id)

    async def died(self, job: Job | None, worker: WorkerProcess, reason: str) -> None:
        """Let the job of a worker that died wait again, or fail where it is not the first."""
        self.metrics.restarts.inc()
        self._say(f"the worker on {worker.device} ended ({reason}); it is started again")
        if job is not None:
            message = f"the last of {MOST_ATTEMPTS} attempts ended with its worker, by {reason}"
            await self._try_again(job, "worker_died", message, counted=True)
            self.hub.changed(job.id)

    def state_changed(self) -> None:
        """Take in that a worker became ready, or ended."""
        trouble = self.trouble
        if trouble is None:
            self._was_ready = True
        elif not self._was_ready and all(worker.refusal for worker in self.workers):
            self.failure = trouble
        if trouble is None or self.failure is not None:
            self.first_word.set()
        self.changed.set()
        self._wake()  # which jobs are for which worker may be known only now

    # ---- inside

    def _wake(self) -> None:
        """Tell idle workers that there may be a job for them."""
        for worker in self.workers:
            worker.wake()

    async def _try_again(self, job: Job, code: str, message: str, *, counted: bool) -> None:
        """Let a job wait again, unless it is to end, or was tried too often and ends with `code`.

        `counted` is false where the attempt says nothing about the job.
        """
        attempts = job.deaths + int(counted)
        if job.id not in self._ending and attempts < MOST_ATTEMPTS:
            await self._stored(partial(self._store.requeue, job.id, counted=counted))
        ending = self._ending.get(job.id)
        if ending is not None:
            await self._end(job, code=ending.code, message=ending.message)
        elif attempts >= MOST_ATTEMPTS:
            await self._end(job, code=code, message=message)
        else:
            self._forget(job.id)
            self._wake()

    def _advance(self, advanced: Advanced) -> None:
        before = self._advanced.get(advanced.job)
        now = time.monotonic()
        if before is None or before.stage != advanced.stage:
            if before is not None:
                seconds = now - self._stage_began[advanced.job]
                self.metrics.stage_seconds.labels(before.stage).observe(seconds)
            self._stage_began[advanced.job] = now
        if before is not None and before.fraction > advanced.fraction:  # a stage tried again
            advanced = replace(advanced, fraction=before.fraction)
        self._advanced[advanced.job] = advanced

    async def _end(self, job: Job, *, code: str | None = None, message: str | None = None) -> None:
        if code is not None:
            await self._drop_unfinished(job.id)
        size = await asyncio.to_thread(files.size_of, self._settings.root, job.id)
        end = partial(self._store.end, job.id, code=code, message=message, size=size)
        ended = await self._stored(end)
        if ended is None:  # it was removed meanwhile
            await self._erase(job.id)
        ways = {None: "is completed", "removed": "is removed"}
        self._say(f"{job.id} {ways.get(code, f'failed ({code}): {message}')}")
        self.metrics.ended(code)
        self._forget(job.id)
        self.hub.changed(job.id)

    async def _drop_unfinished(self, job_id: str) -> None:
        """Remove what no request could go on with: all but a draft."""
        job = await asyncio.to_thread(self._store.get, job_id)
        if job is not None:
            drop = partial(files.drop_unfinished, draft_ready=job.draft_ready)
            await asyncio.to_thread(drop, self._settings.root, job_id)

    async def _stored(self, write: Callable[[], Written]) -> Written:
        """Return what `write` does to the queue on the disk, when the disk lets it."""
        told = False
        while True:
            try:
                return await asyncio.to_thread(write)
            except OperationalError as error:
                if not told:
                    self._say(f"waiting until the queue can be written: {error.orig}")
                told = True
            await asyncio.sleep(RETRY_SECONDS)

    def _forget(self, job_id: str) -> None:
        """Drop what is known of a job beside its record, and tell those who wait for its end."""
        last = self._advanced.pop(job_id, None)
        began = self._stage_began.pop(job_id, None)
        if last is not None and began is not None:
            self.metrics.stage_seconds.labels(last.stage).observe(time.monotonic() - began)
        if (timer := self._timers.pop(job_id, None)) is not None:
            timer.cancel()
        if (ending := self._ending.pop(job_id, None)) is not None:
            ending.done.set()

    def _time_is_over(self, job_id: str, seconds: float) -> None:
        message = f"it took longer than the {seconds:g} s that a job may take on this server"
        self._ending.setdefault(job_id, _Ending("timeout", message, asyncio.Event()))
        for worker in self.workers:
            worker.cancel(job_id)

    async def _erase(self, job_id: str) -> None:
        """Remove a job's files, then its record; again at the next start where that fails."""
        try:
            await asyncio.to_thread(files.remove, self._settings.root, job_id)
        except OSError as error:
            self._say(f"the files of {job_id} cannot be removed: {error}")
            return
        await asyncio.to_thread(self._store.forget, job_id)

    def _rendered(self, job_id: str) -> tuple[str, bool] | None:
        job = self._store.get(job_id)
        if job is None:
            return None
        return self.video(job).model_dump_json(), job.status in ("completed", "failed")

    async def _retain(self) -> None:
        """Remove finished jobs that are too old, or too many for the disk they may take."""
        while True:
            with suppress(OperationalError):  # again in a minute
                ended = await asyncio.to_thread(self._store.with_status, "completed", "failed")
                for job in expired(ended, self._settings.limits, time.time()):
                    await self.remove(job.id, wait=0)
            await asyncio.sleep(RETENTION_SECONDS)
