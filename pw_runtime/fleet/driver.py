# SPDX-License-Identifier: Apache-2.0
"""The driver of a fleet: hires workers, hands out prompts, and puts every clip into its place.

A thread follows each worker and waits for its answers; what they share is in the WorkQueue. At
least once: a prompt whose worker dies is made again. Exactly one result: only the driver writes
into the output folder.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import BadRequest, BadWeights, PixelWizardError
from pw_runtime.fleet.agreement import (
    PROJECT,
    differing_machines,
    require_same_libraries,
    require_same_versions,
    with_budget,
)
from pw_runtime.fleet.cluster import Cluster, WorkerHandle, WorkerLost
from pw_runtime.fleet.layout import Layout
from pw_runtime.fleet.messages import (
    Ended,
    Event,
    Failed,
    Joined,
    Kept,
    Made,
    Said,
    StagedFile,
    Warned,
)
from pw_runtime.fleet.output_folder import OutputFolder, StagedFileLost
from pw_runtime.fleet.work_queue import WorkQueue
from pw_runtime.job.clip import FRAMES, STEPS, TILES
from pw_runtime.job.latents import SUFFIX
from pw_runtime.job.receipt import versions
from pw_runtime.system.progress import Advance, Reporter
from pw_runtime.system.tile_store import state_of
from pw_runtime.types import Outcome, Request

POLL_SECONDS = 10.0  # longest wait of a worker for its next event
LOOK_SECONDS = 0.2  # between two looks of the main thread, which draws the progress
JOIN_SECONDS = 20.0  # how long workers that are ready wait for others that start
_SIZE = re.compile(r"[\d.,]+ [MG]iB")
MAX_STRIKES = 3  # times in a row that a worker may end without having made a clip


class Fleet:
    """One run of a fleet."""

    def __init__(
        self,
        request: Request,
        bundle: Bundle,
        cluster: Cluster,
        reporter: Reporter,
        folder: OutputFolder,
        layout: Layout,
    ) -> None:
        """Prepare a run of the workers of a layout over the prompts of a request."""
        self._request, self._bundle, self._cluster = request, bundle, cluster
        self._reporter, self._folder = reporter, folder
        self._work = WorkQueue(request.prompts, layout.batch(len(request.prompts)))
        self._names = tuple(f"w{index}" for index in range(layout.workers))
        self._planned = layout.by_host
        self._lock = threading.Lock()  # of what follows
        self._handles: dict[str, WorkerHandle] = {}
        self._joined: dict[str, Joined] = {}
        self._versions: dict[str, str] = {}  # of the worker that was the first to join
        self._first = ""
        self._first_join = 0.0
        self._said: set[str] = set()
        self._folders: dict[str, Path] = {}  # of each worker's batch, as the worker names it
        self._clips: dict[str, int] = dict.fromkeys(self._names, 0)
        self._settings: Future[Request] = Future()

    def run(self, ending: Callable[[], bool]) -> dict[str, Outcome]:
        """Make the clips.

        Args:
            ending: tells whether no further prompt may be handed out.

        Returns:
            The outcome of every prompt that is made or has failed, by id.

        Raises:
            BadRequest, BadWeights: the request, the bundle or the machines cannot work.
            WriteFailed: the output folder refuses a file.
            Whatever interrupts the main thread; the workers are then ended at once.
        """
        threads = [
            threading.Thread(target=self._serve, args=(name,), daemon=True) for name in self._names
        ]
        for thread in threads:
            thread.start()
        try:
            self._look(threads, ending)
            self._end_idle()
            for thread in threads:
                thread.join(POLL_SECONDS)
        finally:
            self._work.drain()
            self._settings.cancel()
            for handle in self._hired():
                handle.stop()
            for thread in threads:
                thread.join(POLL_SECONDS)
        if self._work.fatal is not None:
            raise self._work.fatal
        return self._work.outcomes()

    def _look(self, threads: Sequence[threading.Thread], ending: Callable[[], bool]) -> None:
        """Settle what is common, draw the progress and end the run, until nothing is left."""
        told, shown = False, (0, "")
        with self._reporter.steps(self._progress, len(self._request.prompts)) as advance:
            while not self._work.wait(LOOK_SECONDS) and any(t.is_alive() for t in threads):
                if not self._settings.done():
                    self._settle(threads)
                shown = self._show(advance, shown)
                if ending() and not told:
                    told = True
                    self._work.drain()
                    self._reporter.warn(
                        f"ending: no further prompt is begun, {self._work.running} in progress are "
                        "finished; once more ends at once"
                    )
            self._show(advance, shown)

    def _show(self, advance: Advance, shown: tuple[int, str]) -> tuple[int, str]:
        """Draw the number of prompts that are over, and the label, where they have changed."""
        now = len(self._work.outcomes()), self._progress()
        if now != shown:
            advance(now[0] - shown[0])
        return now

    def _progress(self) -> str:
        failed = sum(outcome.error is not None for outcome in self._work.outcomes().values())
        workers = f"{self._work.present} of {len(self._names)} workers"
        return f"clips, {workers}{f', {failed} failed' * bool(failed)}"

    def _settle(self, threads: Sequence[threading.Thread]) -> None:
        """Fix what is the same for all workers once they have joined, or long enough."""
        with self._lock:
            joined = dict(self._joined)
        starting = sum(thread.is_alive() for thread in threads) - len(joined)
        if not joined or (starting > 0 and time.monotonic() < self._first_join + JOIN_SECONDS):
            return
        if starting > 0:
            self._reporter.say(f"begins with {len(joined)} workers; {starting} have not joined yet")
        if notice := differing_machines(joined):
            self._reporter.warn(notice)
        away = sorted({worker.host for worker in joined.values() if not worker.shares_output})
        if away:
            self._reporter.say(
                f"{', '.join(away)} cannot see {self._folder.out}: clips are sent from there"
            )
        try:
            self._settings.set_result(with_budget(self._request, joined, self._planned))
        except BadRequest as error:
            self._work.abort(error)

    def _serve(self, name: str) -> None:
        """Keep one worker in the fleet until nothing is left to do."""
        strikes, refusal = 0, None
        while strikes < MAX_STRIKES and not self._ends():
            before, reason = self._clips[name], ""
            handle: WorkerHandle | None = None
            try:
                handle = self._hire(name)
                self._work_through(name, handle, self._join(name, handle))
            except WorkerLost as lost:
                reason = str(lost)
                if not self._ends():
                    self._reporter.warn(f"{self._label(name)} is lost: {reason}")
            except (BadRequest, BadWeights) as error:
                refusal = error
                break
            except CancelledError:  # the run ends before it began
                break
            except Exception as error:  # the output folder refuses files, or a fault of our own
                self._work.abort(error)
            finally:
                self._dismiss(name, handle, reason)
            strikes = 0 if self._clips[name] > before else strikes + 1
        if refusal is not None:
            self._refuse(name, refusal)
        elif strikes == MAX_STRIKES:
            self._reporter.warn(
                f"{self._label(name)} is given up: {strikes} times in a row it ended without a clip"
            )

    def _ends(self) -> bool:
        return self._work.wait(0) or self._work.is_draining

    def _hire(self, name: str) -> WorkerHandle:
        # A name of its own for each process: a lost one may still write into its folder.
        handle = self._cluster.start(f"{name}-{secrets.token_hex(3)}")
        with self._lock:
            self._handles[name] = handle
        return handle

    def _dismiss(self, name: str, handle: WorkerHandle | None, reason: str) -> None:
        """End a worker, and take back what it has not finished."""
        for prompt_id in self._work.leave(name, reason):
            self._reporter.warn(f"prompt {prompt_id} failed: {reason}")
        with self._lock:
            self._handles.pop(name, None)
        if handle is not None:
            handle.stop()

    def _hired(self) -> list[WorkerHandle]:
        with self._lock:
            return list(self._handles.values())

    def _end_idle(self) -> None:
        """End workers that have not begun to work: nothing is left for them."""
        with self._lock:
            waiting = [
                handle for name, handle in self._handles.items() if not self._work.is_present(name)
            ]
        self._settings.cancel()
        for handle in waiting:
            handle.stop()

    def _refuse(self, name: str, error: PixelWizardError) -> None:
        """Do without a worker that cannot take part; end the run where that is true of all.

        Before the run has begun, one is enough: the cluster is not as it should be.
        """
        alone = self._work.nothing_made and self._work.present == 0
        if alone or not self._settings.done():
            self._work.abort(error)
        else:
            self._say_once(name, f"not used any more: {error}", self._reporter.warn)

    def _join(self, name: str, handle: WorkerHandle) -> Request:
        """Check a worker against the driver and the others; return the request of all.

        Raises BadRequest for a worker that does not fit, WorkerLost, CancelledError.
        """
        found: dict[str, str] = handle.call("versions")
        require_same_versions(name, found, versions()[PROJECT])
        with self._lock:
            if not self._versions:
                self._versions, self._first = found, name
        require_same_libraries(name, found, self._first, self._versions)
        joined: Joined = handle.call(
            "join",
            str(self._bundle.root),
            self._bundle.weights_digest,
            self._request.options,
            str(self._folder.staging),
            self._folder.token,
            self._bundle.lora_files,
        )
        with self._lock:
            self._first_join = self._first_join or time.monotonic()
            self._joined[name] = joined
        self._work.enter(name)
        return self._settings.result()

    def _work_through(self, name: str, handle: WorkerHandle, request: Request) -> None:
        """Make batches until there is none, or until a whole batch has failed.

        Whatever broke the worker's process or its GPU stays broken in that process.

        Raises WorkerLost, WriteFailed; BadRequest where the worker cannot make what others can.
        """
        while batch := self._work.take(name):
            folder = handle.call("start", replace(request, prompts=batch, partial=True))
            self._folders[name] = Path(folder)
            before = self._clips[name]
            self._follow(name, handle)
            if self._clips[name] == before:
                break
        else:
            handle.call("leave")

    def _follow(self, name: str, handle: WorkerHandle) -> None:
        """Act on a worker's events up to the end of its batch.

        Raises WorkerLost, WriteFailed; BadRequest where the worker cannot make what others can.
        """
        ended: Ended | None = None
        while ended is None:
            events: list[Event] = handle.call("events", POLL_SECONDS)
            for event in events:
                match event:
                    case Said(text):
                        self._say_once(name, text, self._reporter.say)
                    case Warned(text):
                        self._reporter.warn(f"{self._label(name)}: {text}")
                    case Made(prompt_id, files):
                        self._publish(name, handle, prompt_id, files)
                    case Failed(prompt_id, error):
                        self._fail(name, prompt_id, error)
                    case Kept(files):
                        self._take(name, handle, files)
                    case Ended():
                        ended = event
        if ended.error is not None and ended.lost:
            raise WorkerLost(ended.error)
        if ended.error is not None and ended.bad_input:
            self._work.hand_back(name)
            raise BadRequest(ended.error)
        if ended.error is not None:
            self._reporter.warn(f"{self._label(name)}: {ended.error}")
        for prompt in self._work.in_hand(name):
            self._fail(name, prompt.id, ended.error or "the batch ended without it")

    def _say_once(self, name: str, text: str, say: Callable[[str], None]) -> None:
        """Pass on what every worker may say, once: sizes of memory apart."""
        essence = _SIZE.sub("", text)
        with self._lock:
            known = essence in self._said
            self._said.add(essence)
        if not known:
            say(f"{self._label(name)}: {text}")

    def _label(self, name: str) -> str:
        """Return a worker's name with its machine's, once that is known."""
        joined = self._joined.get(name)
        return f"worker {name}" + (f" on {joined.host}" if joined else "")

    def _fail(self, name: str, prompt_id: str, error: str) -> None:
        if not self._work.failed(name, prompt_id, error):
            label = self._label(name)
            self._reporter.warn(f"prompt {prompt_id} failed on {label}, and is tried again")

    def _publish(
        self, name: str, handle: WorkerHandle, prompt_id: str, files: Sequence[StagedFile]
    ) -> None:
        """Put a finished clip into the output folder. Raises WorkerLost, WriteFailed."""
        video = self._take(name, handle, files)
        begun = [STEPS, FRAMES, TILES, state_of(Path(TILES)).name]
        if not self._request.options.save_latents:
            begun.append(SUFFIX)
        for ending in begun:  # of an attempt that failed, or of another run
            self._folder.remove(prompt_id + ending)
        self._work.made(name, prompt_id, video)
        self._clips[name] += 1
        self._reporter.finished(video)

    def _take(self, name: str, handle: WorkerHandle, files: Sequence[StagedFile]) -> Path:
        """Bring a worker's files into the output folder; return the last one's path."""
        try:
            folder = self._folders[name]
            if not self._joined[name].shares_output:
                folder = self._folder.receive(
                    name, files, lambda file, offset: handle.call("read", file, offset)
                )
            return self._folder.publish(folder, files)
        except StagedFileLost as error:
            raise WorkerLost(str(error)) from error
