# SPDX-License-Identifier: Apache-2.0
"""A server under test: `pw serve` in a process of its own, and what its processes take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from pw_runtime.errors import BadResult

PATIENCE: Final = 600.0  # seconds for the server to start
ENDING: Final = 60.0  # seconds for it to end


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs.

    Attributes:
        root: its folder.
        url: its address.
        pid: of the process that answers.
    """

    root: Path
    url: str
    pid: int

    @property
    def worker(self) -> int:
        """Process id of its worker."""
        children = (
            Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="utf-8").split()
        )
        if len(children) != 1:
            raise BadResult("the server has no worker", got=f"{len(children)} children")
        return int(children[0])

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the answer to a request: a POST where there is a body. Raises BadResult."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        try:
            with urlopen(Request(self.url + path, data, headers), timeout=PATIENCE) as answer:
                return dict(json.load(answer))
        except HTTPError as error:
            raise BadResult(f"{path} was refused", got=error.read().decode()) from error

    def job_seconds(self, video_id: str) -> float:
        """Return the seconds that a job computed, by the receipts of its two runs."""
        total = 0.0
        for run in ("draft", "final"):
            receipt = json.loads(
                (self.root / "jobs" / video_id / run / "0.json").read_text(encoding="utf-8")
            )
            total += sum(s for stage, s in receipt["seconds"].items() if stage != "load")
        return total


@contextmanager
def serving(model: Path, preset: str, root: Path) -> Iterator[Server]:
    """Run a server that is ready, and end it. Raises BadResult where it does not start."""
    most = ["--max-queued", "100000", "--max-queued-per-client", "100000"]
    command = [sys.executable, "-m", "pw_runtime", "serve", "--model", str(model)]
    command += ["--preset", preset, "--root", str(root), "--port", "0", *most]
    # Not with `child_environment`: what ends a child with its parent imports torch.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    assert process.stderr is not None
    lines = iter(process.stderr)
    try:
        told = []
        for line in lines:
            told.append(line)
            if line.startswith("http://"):
                break
        else:
            raise BadResult("the server did not start", got="".join(told))
        threading.Thread(target=list, args=(lines,), daemon=True).start()
        server = Server(root, told[-1].strip(), process.pid)
        _wait_until_ready(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(server: Server, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            server.ask("/ready")
        except BadResult:
            time.sleep(0.1)
        else:
            return
    raise BadResult("the server did not become ready")


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
