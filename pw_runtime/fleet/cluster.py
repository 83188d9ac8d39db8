# SPDX-License-Identifier: Apache-2.0
"""Ray: the only module that knows it. Connects, lists nodes, starts workers and asks them.

Ray places the workers, watches them and says when one is gone; the driver decides what follows.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO, cast
from urllib.parse import urlsplit

from pw_runtime.errors import BadRequest, PixelWizardError
from pw_runtime.fleet.layout import Layout, Node
from pw_runtime.fleet.worker import Worker
from pw_runtime.system.packages import pip_install, require_packages

CONNECT_SECONDS = 10


class WorkerLost(Exception):
    """A worker that is gone, or does not do what it should; the text is the reason."""


class WorkerHandle(Protocol):
    """A worker as the driver sees it."""

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the worker, and wait until it returns.

        Raises WorkerLost, and the PixelWizardError that the method raises.
        """

    def stop(self) -> None:
        """End the worker at once; whoever waits for it gets WorkerLost."""


class Cluster(Protocol):
    """Starts workers."""

    def start(self, name: str) -> WorkerHandle:
        """Start a worker as soon as there is room for it; return at once."""


@contextmanager
def connected(address: str | None, *, may_start: bool = True) -> Iterator[bool]:
    """Connect to a Ray cluster inside the block.

    Args:
        address: of the cluster; None: that of RAY_ADDRESS, or the one that runs on this machine.
        may_start: without any of these, start one on this machine for the time of the block.

    Yields:
        False where there is no cluster, and none may be started.

    Raises:
        BadRequest: there is none at the address, it is of another version, or it refuses us.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    name = address or os.environ.get("RAY_ADDRESS") or "auto"
    if name == "auto":
        name = cluster_of_this_machine() or "local"
    if name == "local" and not may_start:
        yield False
        return
    if name.startswith("ray://"):
        require_packages("--address ray://", "grpcio")
    if name != "local":
        _require_listener(name)
    _init(name)
    with redirect_stdout(cast(TextIO, _FirstLines(sys.stderr))):
        try:
            yield True
        finally:
            ray.shutdown()


class _FirstLines:
    """A text stream that passes on what Ray prints without its excerpts from logs.

    Ray tells of dead nodes on stdout, whatever it is told, with the last lines of their logs,
    indented; they are in its session folder.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Pass on the lines that are not indented."""
        for line in text.splitlines():
            if line.strip() and not line.startswith((" ", "\t")):
                self._stream.write(f"{line}\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _init(address: str) -> None:
    """Call ray.init. Raises BadRequest where the cluster does not take this driver."""
    import ray

    options: dict[str, Any] = {} if address.startswith("ray://") else {"include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (RuntimeError, ValueError, ImportError, OSError, ray.exceptions.RayError) as error:
        raise refused(address, error) from error


def refused(address: str, error: Exception) -> BadRequest:
    """Return the error for a cluster that is there and does not take this driver."""
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return BadRequest(
            "the cluster runs another version of Ray or Python",
            got=text[:400],
            do="use the same versions of Ray and Python on every machine, down to the last number",
        )
    return BadRequest(
        f"the Ray cluster at {address} does not take this driver",
        got=text[:400],
        wanted="the token of the cluster, if it has one",
        do="copy ~/.ray/auth_token from the head node to this machine and set RAY_AUTH_MODE=token; "
        "nodes need both too, before `ray start`",
    )


def cluster_of_this_machine() -> str | None:
    """Return the address of the cluster that this machine is in, if somebody listens there.

    Ray leaves it in a file, also when the cluster was killed, and would then try for minutes.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    file = Path(folder, "ray", "ray_current_cluster")
    try:
        address = file.read_text(encoding="utf-8").strip()
        _listener(address).close()
    except (OSError, ValueError):
        return None
    return address


def _require_listener(address: str) -> None:
    """Raise BadRequest where nobody listens: Ray itself would try for minutes."""
    try:
        _listener(address).close()
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"no Ray cluster answers at {address}",
            got=error,
            wanted="ray://HOST:10001 from anywhere, or HOST:6379 from a node of the cluster",
            do="start one with `ray start --head` (`pw docs fleet`), or correct --address",
        ) from error


def _listener(address: str) -> socket.socket:
    """Return a connection to an address. Raises OSError, and ValueError for no address."""
    parts = urlsplit(address if "//" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        raise ValueError("an address without a host or a port")
    return socket.create_connection((parts.hostname, parts.port), CONNECT_SECONDS)


def nodes() -> tuple[Node, ...]:
    """Return the living nodes of the cluster, by name."""
    import ray

    found = [
        Node(
            name=node["NodeManagerHostname"],
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
            memory_bytes=int(node["Resources"].get("memory", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return tuple(sorted(found, key=lambda node: node.name))


class RayCluster:
    """The connected cluster, which gives every worker the same resources."""

    def __init__(self, layout: Layout) -> None:
        """Take what each worker gets."""
        import ray

        self._processes = layout.processes
        # An actor is on one node, with all of its GPUs. Restarted by the driver, which must first
        # see whether the new one fits to the others.
        self._actor = ray.remote(Worker).options(
            num_cpus=layout.cpus,
            num_gpus=layout.gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )

    def start(self, name: str) -> WorkerHandle:
        """Start an actor."""
        return _RayWorker(self._actor.remote(name, self._processes))


class _RayWorker:
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def call(self, method: str, *args: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self._actor, method).remote(*args))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, PixelWizardError):
                raise cause from error
            raise WorkerLost(_last_line(cause)) from error
        except ray.exceptions.RayError as error:
            raise _lost(error) from error

    def stop(self) -> None:
        import ray

        with suppress(ray.exceptions.RayError):
            ray.kill(self._actor)


def _lost(error: Exception) -> Exception:
    """Return why a worker is gone, or BadRequest where the project is not installed there."""
    text = str(error)
    if "No module named 'pw_" in text:
        return BadRequest(
            "a machine of the cluster has no pixelwizard-runtime that can be a worker",
            got=_last_line(error),
            wanted="the version of this machine, installed for the Python that runs Ray there",
            do=pip_install("pixelwizard-runtime"),
        )
    return WorkerLost(_last_line(error))


def _last_line(error: object) -> str:
    """Return the last line with text of an error, which says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
