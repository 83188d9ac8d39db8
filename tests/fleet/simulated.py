# SPDX-License-Identifier: Apache-2.0
"""A cluster without Ray and without networks, whose workers do what a test wants."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pw_runtime.errors import BadRequest
from pw_runtime.fleet.cluster import WorkerHandle, WorkerLost
from pw_runtime.fleet.messages import Ended, Event, Failed, Joined, Made, StagedFile, Warned
from pw_runtime.job.receipt import versions
from pw_runtime.types import Prompt, Request

Fate = Literal["made", "dies", "loses a rank", "fails", "bad input"]
Decide = Callable[[str, Prompt], Fate]
"""Worker's name in the fleet ("w0") and prompt -> what becomes of them."""


def video_of(prompt: Prompt) -> bytes:
    """The bytes of a clip, which its prompt and position alone decide."""
    return f"{prompt.position}: {prompt.text}".encode() * 50


class SimulatedCluster:
    """Starts simulated workers, and counts what they did."""

    def __init__(
        self,
        decide: Decide = lambda worker, prompt: "made",
        *,
        shared: bool = True,
        version: Callable[[str], dict[str, str]] = lambda worker: {},
        refuses: Callable[[str], str | None] = lambda worker: None,
    ) -> None:
        self.decide, self.shared = decide, shared
        self.version, self.refuses = version, refuses
        self.started: list[str] = []
        self.batches: list[list[str]] = []  # of prompt ids, as they were begun
        self.requests: list[Request] = []
        self.tries: Counter[str] = Counter()  # by prompt id
        self.began = threading.Event()  # a batch
        self.may_finish = threading.Event()  # batches end
        self.may_finish.set()

    def start(self, name: str) -> WorkerHandle:
        self.started.append(name)
        return SimulatedWorker(self, name)


class SimulatedWorker:
    """A worker that is asked as an actor is, and answers from the test's thread."""

    def __init__(self, cluster: SimulatedCluster, name: str) -> None:
        self.cluster, self.name, self.slot = cluster, name, name.partition("-")[0]
        self.stopped = threading.Event()
        self.folder, self.contents = Path(), dict[str, bytes]()
        self.batch: tuple[Prompt, ...] = ()

    def call(self, method: str, *args: Any) -> Any:
        if self.stopped.is_set():
            raise WorkerLost("stopped")
        return getattr(self, method)(*args)

    def stop(self) -> None:
        self.stopped.set()

    def versions(self) -> dict[str, str]:
        return {**versions(), "host": "here", **self.cluster.version(self.slot)}

    def join(
        self,
        model: str,
        digest: str,
        options: object,
        staging: str,
        token: str,
        loras: object,
    ) -> Joined:
        if reason := self.cluster.refuses(self.slot):
            raise BadRequest(reason)
        assert (Path(staging) / "token").read_text() == token
        self.folder = Path(staging) / self.name
        return Joined(
            host="here",
            shares_output=self.cluster.shared,
            machine={},
            host_bytes=2**34,
            process_bytes=2**28,
            gpu_bytes=None,
        )

    def start(self, request: Request) -> str:
        self.cluster.requests.append(request)
        self.cluster.batches.append([prompt.id for prompt in request.prompts])
        self.batch = request.prompts
        self.cluster.began.set()
        return str(self.folder if self.cluster.shared else "/elsewhere")

    def events(self, seconds: float) -> list[Event]:
        while not self.cluster.may_finish.wait(0.01):
            if self.stopped.is_set():
                raise WorkerLost("stopped")
        events: list[Event] = []
        for prompt in self.batch:
            self.cluster.tries[prompt.id] += 1
            match self.cluster.decide(self.slot, prompt):
                case "made":
                    events.append(Made(prompt.id, self.written(prompt)))
                case "dies" if events:  # after what it finished was told
                    self.batch = (prompt,)
                    return events
                case "dies":
                    raise WorkerLost("the node died")
                case "loses a rank":
                    return [*events, Ended("rank 1 was killed", lost=True)]
                case "fails":
                    events += [Warned(f"prompt {prompt.id} failed"), Failed(prompt.id, "no luck")]
                case "bad input":
                    return [*events, Ended("this clip does not fit into memory", bad_input=True)]
        return [*events, Ended()]

    def written(self, prompt: Prompt) -> tuple[StagedFile, ...]:
        self.folder.mkdir(exist_ok=True)
        files = []
        contents = {f"{prompt.id}.json": b"{}", f"{prompt.id}.mp4": video_of(prompt)}
        for name, content in contents.items():
            if self.cluster.shared:
                (self.folder / name).write_bytes(content)
            self.contents[name] = content
            digest = hashlib.sha256(content).hexdigest()
            files.append(StagedFile(name=name, bytes=len(content), sha256=digest))
        return tuple(files)

    def read(self, name: str, offset: int) -> bytes:
        return self.contents[name][offset : offset + 100]

    def leave(self) -> None:
        """Nothing is left."""
