# SPDX-License-Identifier: Apache-2.0
"""Servers in processes of their own, as users run them, with a fake or a real worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

FAKE_WORKER = str(Path(__file__).with_name("fake_worker.py"))
PATIENCE = 60.0  # seconds until a test that waits fails
LAUNCH = """
import json, sys
from pathlib import Path
from pw_runtime.errors import BadRequest
from pw_runtime.presets import PRESETS
from pw_runtime.server.serve import serve
from pw_runtime.server.settings import Limits, Settings

given = json.loads(sys.argv[1])
settings = Settings(
    model=Path(given.pop("model")),
    root=Path(given.pop("root")),
    presets={name: PRESETS[name] for name in given.pop("presets")},
    limits=Limits(**given.pop("limits")),
    worker=(sys.executable, given.pop("worker")),
    backoff_seconds=0.01,
    port=0,
    **given,
)
try:
    number = serve(settings, lambda text: print(text, file=sys.stderr, flush=True))
except BadRequest as error:
    print(error, file=sys.stderr, flush=True)
    sys.exit(2)
sys.exit(0 if number is None else 128 + number)
"""


@dataclass
class Served:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)
    drained: threading.Event = field(default_factory=threading.Event)  # at the end of the lines

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def create(self, prompt: str = "a fox", **fields: Any) -> dict[str, Any]:
        """Queue a job; return its Video."""
        answer = self.http.post("/v1/videos", json={"prompt": prompt, **fields})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def video(self, video_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/videos/{video_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def until(self, video_id: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the first state of a video that is as awaited."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            video = self.video(video_id)
            if done(video):
                return video
            if video["status"] in ("completed", "failed"):
                raise AssertionError(f"it has ended: {video}; {self.lines}")
            self.process.poll()
            time.sleep(0.02)  # between two questions; nothing depends on its length
        raise AssertionError(f"not in time: {self.video(video_id)}; {self.lines}")

    def until_ended(self, video_id: str) -> dict[str, Any]:
        return self.until(video_id, lambda video: video["status"] in ("completed", "failed"))

    def until_running(self, video_id: str) -> dict[str, Any]:
        """Return a video whose draft is there, and whose high-res stage runs."""
        return self.until(video_id, lambda video: video["stage"] == "highres")

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Return when something is so."""
        end = time.monotonic() + PATIENCE
        while not is_so():
            assert time.monotonic() < end, self.lines
            assert self.process.poll() is None, self.lines
            time.sleep(0.02)  # between two questions; nothing depends on its length

    def until_said(self, text: str) -> None:
        """Return when a line of the server has a text."""
        self.wait_for(lambda: any(text in line for line in self.lines))

    def error(self, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
        """Return the status and the error of a request that fails."""
        answer = self.http.request(method, path, **options)
        content = answer.json()
        assert set(content) == {"error"}, answer.text
        assert set(content["error"]) == {"message", "type", "code", "param"}
        return answer.status_code, content["error"]

    def worker(self) -> int:
        """Return the process id of the worker."""
        (pid,) = self.workers()
        return pid

    def workers(self) -> list[int]:
        """Return the process ids of the workers, in the order of their starts."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def restart_second_worker(self) -> None:
        """Kill that of two workers which was started last; return when it is started again."""
        self.wait_for(lambda: len(self.workers()) == 2)
        first, second = self.workers()
        os.kill(second, signal.SIGKILL)
        self.wait_for(lambda: self.workers()[1:] not in ([], [second]))
        assert self.workers()[0] == first

    def end(self) -> int:
        """Ask for the end; return the exit code."""
        self.process.terminate()
        return self.process.wait(PATIENCE)


def python_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@contextmanager
def running(command: Sequence[str], **environment: str) -> Iterator[Served]:
    """Run a server whose standard error begins with its address."""
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**python_path(), **environment}
    )
    assert process.stderr is not None
    lines: list[str] = []
    try:
        while not (line := process.stderr.readline()).startswith("http://"):
            lines.append(line)
            if not line:
                raise AssertionError("".join(lines))
        served = Served(process, line.strip(), lines)

        def drain() -> None:
            assert process.stderr is not None
            lines.extend(process.stderr)
            served.drained.set()

        threading.Thread(target=drain, daemon=True).start()
        yield served
        served.http.close()
    finally:
        process.kill()
        process.wait()


def launch(
    root: Path,
    *,
    model: Path | None = None,
    presets: Sequence[str] = ("nano", "nano-hd", "2k", "4k", "draft"),
    limits: dict[str, Any] | None = None,
    **settings: Any,
) -> list[str]:
    """Return the command of a server with the fake worker."""
    if model is None:
        model = root.parent / "model"
        model.mkdir(exist_ok=True)
    given = {
        "model": str(model),
        "root": str(root),
        "presets": presets,
        "limits": limits or {},
        "worker": FAKE_WORKER,
        **settings,
    }
    return [sys.executable, "-c", LAUNCH, json.dumps(given)]


@contextmanager
def serving(root: Path, **settings: Any) -> Iterator[Served]:
    """Run a server with the fake worker, which is ready."""
    with running(launch(root, **settings)) as served:
        for token in [*settings.get("tokens", {})][:1]:
            served.http.headers["authorization"] = f"Bearer {token}"
        wait_until_ready(served)
        yield served


def wait_until_ready(served: Served) -> None:
    served.wait_for(lambda: served.http.get("/ready").status_code == 200)
