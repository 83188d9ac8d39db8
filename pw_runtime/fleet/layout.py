# SPDX-License-Identifier: Apache-2.0
"""Places of the workers of a fleet: how many fit on each node of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pw_runtime.errors import BadRequest

MAX_BATCH = 4  # prompts; more would balance worse and lose more when a node dies
BATCHES_PER_WORKER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine of a cluster, as the cluster describes it."""

    name: str
    cpus: int
    gpus: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The workers of a fleet: what each gets, and how many there are on each node."""

    gpus: int  # for each worker
    cpus: int  # for each worker
    processes: int = 1  # that make each clip of a worker together: one per GPU, or on its CPUs
    places: tuple[tuple[Node, int], ...]  # nodes with at least one worker

    @property
    def each(self) -> str:
        """Description of what a worker gets."""
        together = f", {self.processes} processes that make each clip together"
        return _needs(self.gpus, self.cpus) + together * (self.processes > 1)

    @property
    def workers(self) -> int:
        """The number of workers."""
        return sum(count for _, count in self.places)

    @property
    def by_host(self) -> dict[str, int]:
        """The number of workers on each host, which may run several nodes."""
        counts: dict[str, int] = {}
        for node, count in self.places:
            counts[node.name] = counts.get(node.name, 0) + count
        return counts

    def batch(self, prompts: int) -> int:
        """Return how many prompts a worker gets at a time.

        A batch loads each network once, and what a dying node takes along is at most one batch.
        """
        return max(1, min(MAX_BATCH, -(-prompts // (BATCHES_PER_WORKER * self.workers))))


def lay_out(
    nodes: Sequence[Node],
    gpus: int | None,
    cpus: int | None,
    workers: int | None,
    processes: int | None = None,
) -> Layout:
    """Fill the nodes with workers, each of them on one node.

    Args:
        nodes: of the cluster.
        gpus: for each worker; None: 1 where the cluster has any, otherwise 0.
        cpus: for each worker; None: its share of a node where it has a GPU, otherwise 1 for each of
            its processes.
        workers: most that are wanted; None: as many as fit.
        processes: of each worker on CPUs; None: 1. On GPUs there is one for each.

    Raises:
        BadRequest: no node has what a worker asks for, or that is contradictory.
    """
    if gpus is None:
        gpus = 1 if any(node.gpus for node in nodes) else 0
    processes = _processes(processes, gpus, cpus)
    if cpus is None:
        cpus = min((node.cpus * gpus // node.gpus for node in nodes if node.gpus), default=1)
        cpus = max(1, cpus) if gpus else processes
    room = [(node, _fitting(node, gpus, cpus)) for node in nodes]
    if not any(count for _, count in room):
        raise BadRequest(
            "no node of the cluster has room for a worker",
            got=_largest(nodes, gpus),
            wanted=f"{_needs(gpus, cpus)} on one node",
            do="add a node, or ask for less: --gpus-per-worker, --processes-per-worker, "
            "--cpus-per-worker",
        )
    return Layout(gpus=gpus, cpus=cpus, processes=processes, places=_at_most(workers, room))


def _processes(asked: int | None, gpus: int, cpus: int | None) -> int:
    """Return the processes of each worker. Raises BadRequest."""
    if gpus:
        if asked not in (None, gpus):
            raise BadRequest(
                "a worker has one process on each of its GPUs",
                got=f"--processes-per-worker {asked}, and {_count(gpus, 'GPU')} per worker",
                do=f"make it --gpus-per-worker {asked}; on CPUs add --gpus-per-worker 0",
            )
        return gpus
    processes = asked or 1
    if cpus is not None and cpus < processes:
        raise BadRequest(
            "a process of a worker computes on at least one CPU of its own",
            got=f"--processes-per-worker {processes} and --cpus-per-worker {cpus}",
            do=f"leave --cpus-per-worker out, or make it at least {processes}",
        )
    return processes


def _needs(gpus: int, cpus: int) -> str:
    return f"{_count(gpus, 'GPU')} and " * bool(gpus) + _count(cpus, "CPU")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _largest(nodes: Sequence[Node], gpus: int) -> str:
    """Describe the node that comes nearest to what is asked for."""
    if not nodes:
        return "no node"
    node = max(nodes, key=lambda node: (node.gpus if gpus else 0, node.cpus))
    which = f", the largest of {len(nodes)} nodes" * (len(nodes) > 1)
    return f"{node.name}: {_count(node.gpus, 'GPU')}, {_count(node.cpus, 'CPU')}{which}"


def _fitting(node: Node, gpus: int, cpus: int) -> int:
    by_cpu = node.cpus // cpus
    return min(by_cpu, node.gpus // gpus) if gpus else by_cpu


def _at_most(workers: int | None, room: Sequence[tuple[Node, int]]) -> tuple[tuple[Node, int], ...]:
    """Return the nodes with their workers, spread evenly where fewer are wanted than fit."""
    counts = [0] * len(room)
    left = sum(count for _, count in room)
    left = left if workers is None else min(workers, left)
    while left:
        for index, (_, most) in enumerate(room):
            if left and counts[index] < most:
                counts[index] += 1
                left -= 1
    return tuple((node, count) for (node, _), count in zip(room, counts, strict=True) if count)
