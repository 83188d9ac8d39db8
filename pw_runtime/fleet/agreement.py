# SPDX-License-Identifier: Apache-2.0
"""Common ground of the workers of a fleet, so that it matters to no clip who makes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from pw_runtime.errors import BadRequest
from pw_runtime.fleet.messages import Joined
from pw_runtime.types import Request

PROJECT = "pixelwizard-runtime"


def require_same_versions(worker: str, versions: Mapping[str, str], driver: str) -> None:
    """Raise BadRequest where a worker has another version of this project than the driver.

    Args:
        worker: its name.
        versions: what it has, and the name of its `host`.
        driver: the driver's version of the project.
    """
    if versions[PROJECT] != driver:
        raise BadRequest(
            f"worker {worker} on {versions['host']} has another version of {PROJECT}",
            got=versions[PROJECT],
            wanted=f"{driver}, as the driver has",
            do="install the same version on every machine",
        )


def require_same_libraries(
    worker: str, versions: Mapping[str, str], first: str, reference: Mapping[str, str]
) -> None:
    """Raise BadRequest where two workers have other libraries: their clips would differ."""
    different = [
        name for name in reference if name != "host" and versions.get(name) != reference[name]
    ]
    if different:
        raise BadRequest(
            f"worker {worker} on {versions['host']} has other libraries than worker {first} on "
            f"{reference['host']}: a clip would depend on who makes it",
            got=", ".join(f"{name} {versions.get(name)}" for name in different),
            wanted=", ".join(f"{name} {reference[name]}" for name in different),
            do="install the same versions on every machine",
        )


def differing_machines(joined: Mapping[str, Joined]) -> str | None:
    """Describe what makes the last bits of a clip depend on its worker; None: nothing does."""
    names = sorted({name for worker in joined.values() for name in worker.machine})
    parts = []
    for name in names:
        values = Counter(str(worker.machine.get(name, "none")) for worker in joined.values())
        if len(values) > 1:
            found = ", ".join(f"{value} ({count})" for value, count in values.most_common())
            parts.append(f"{name}: {found}")
    if not parts:
        return None
    return f"the last bits of a clip depend on the worker that makes it: {'; '.join(parts)}"


def with_budget(
    request: Request, joined: Mapping[str, Joined], planned: Mapping[str, int]
) -> Request:
    """Return the request with one memory budget for all workers, so that all plan the same.

    A budget that was asked for holds for each worker. Otherwise it is what the scarcest machine has
    free, divided among its workers: those that joined, or as many as are planned there.

    Raises:
        BadRequest: a machine does not tell how much memory is free.
    """
    host, gpu = request.host_memory, request.gpu_memory
    if host is None:
        unknown = [worker.host for worker in joined.values() if worker.host_bytes is None]
        if unknown:
            raise BadRequest(
                f"cannot determine the free memory of {unknown[0]}",
                do="add --host-memory, for each worker, e.g. 32GiB",
            )
        count = Counter(worker.host for worker in joined.values())
        host = min(
            (worker.host_bytes or 0) // max(count[worker.host], planned.get(worker.host, 0))
            + worker.process_bytes
            for worker in joined.values()
        )
    if gpu is None:
        free = [worker.gpu_bytes for worker in joined.values() if worker.gpu_bytes is not None]
        gpu = min(free, default=None)
    return replace(request, host_memory=host, gpu_memory=gpu)
