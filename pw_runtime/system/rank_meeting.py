# SPDX-License-Identifier: Apache-2.0
"""The beginning of a run on several ranks: they find each other and compare what they have."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from pw_runtime.errors import BadRequest, RankFailed
from pw_runtime.system.rank_watch import RankWatch, connect
from pw_runtime.system.ranks import DEADLINE, Ranks

ARRIVAL: Final = 120.0  # seconds until all ranks must have started
_FAREWELL: Final = 20.0  # seconds that a store stays for ranks that have not come yet
_CANNOT: Final = "cannot take part"


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a rank in a run, as launchers say it in the environment.

    Attributes:
        rank: of this process.
        size: number of ranks.
        local: number of this process on its machine.
        host, port: of the store through which they meet.
        hosting: this process holds the store; else a launcher does.
    """

    rank: int
    size: int
    local: int
    host: str
    port: int
    hosting: bool


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return what torchrun, or `pw` itself, says of this process; None where it runs alone.

    Raises BadRequest for variables that are incomplete.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in environment]
    if "WORLD_SIZE" not in given or environment["WORLD_SIZE"] == "1":
        return None
    try:
        rank, size, local, port = (
            int(environment[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
    except (KeyError, ValueError) as error:
        raise BadRequest(
            "the environment describes several ranks, but not this one",
            got=", ".join(f"{name}={environment[name]}" for name in given),
            wanted=f"{', '.join(names)}, all but the address numbers",
            do="start the ranks with torchrun, or unset WORLD_SIZE and take --processes",
        ) from error
    hosting = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host = environment.get("MASTER_ADDR", "127.0.0.1")
    return Place(rank, size, local, host, port, hosting)


@contextmanager
def joined(
    place: Place,
    prepared: Callable[[], tuple[torch.device, Mapping[str, str]]],
    *,
    deadline: float = DEADLINE,
) -> Iterator[Ranks]:
    """Meet the other ranks, make sure that all of them do the same work, and leave at the end.

    Args:
        place: of this process.
        prepared: returns the device that it computes on, and everything that must be equal on all
            ranks, by name. What it raises is told to the others.
        deadline: seconds that one rank waits for the data of another.

    Raises:
        BadRequest: a rank does not come, cannot take part, or is different.
        RankFailed: a rank died.
    """
    server = _store(place)
    # A launcher that starts the ranks once more keeps its store.
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    store = PrefixStore(attempt, server)
    device = _meet(store, place, prepared)
    # Connections between GPUs are made through the store, at the first exchange of each group.
    store.set_timeout(timedelta(seconds=deadline))
    own = PrefixStore(attempt, connect(place.host, server.port, ARRIVAL))
    watch = RankWatch(own, place.rank, place.size)
    store.set(f"here {place.rank}", "")
    store.wait([f"here {rank}" for rank in range(place.size)], timedelta(seconds=ARRIVAL))
    watch.start()
    try:
        ranks = Ranks(store, watch, place.rank, place.size, device, deadline)
    except BaseException:
        watch.close()
        raise
    try:
        yield ranks
    except BaseException as error:
        if not isinstance(error, RankFailed):
            ranks.fail(error)
        raise
    finally:
        ranks.close()


def _store(place: Place) -> TCPStore:
    """Open the store. Raises BadRequest."""
    try:
        return TCPStore(
            place.host,
            place.port,
            is_master=place.hosting,
            wait_for_workers=False,
            timeout=timedelta(seconds=ARRIVAL),
        )
    except RuntimeError as error:
        raise BadRequest(
            f"rank {place.rank} cannot meet the others at {place.host}, port {place.port}",
            got=str(error).splitlines()[0],
            do="choose another port (torchrun --master-port), or see whether rank 0 still runs",
        ) from error


def _meet(
    store: Store,
    place: Place,
    prepared: Callable[[], tuple[torch.device, Mapping[str, str]]],
) -> torch.device:
    """Compare what must be equal; return the device. Raises BadRequest."""
    keys = [f"identity {rank}" for rank in range(place.size)]
    try:
        device, identity = prepared()
    except BaseException as error:
        store.set(keys[place.rank], json.dumps({_CANNOT: str(error) or type(error).__name__}))
        if place.hosting:  # the others are to hear of it: with this process the store ends
            with suppress(RuntimeError):
                store.wait(keys, timedelta(seconds=_FAREWELL))
        raise
    if device.type == "cuda" and not dist.is_nccl_available():
        lacking = "this PyTorch has no NCCL, through which GPUs exchange tensors"
        store.set(keys[place.rank], json.dumps({_CANNOT: lacking}))
        raise BadRequest(lacking, do="install PyTorch for CUDA on Linux, or use --device cpu")
    store.set(keys[place.rank], json.dumps(dict(identity)))
    try:
        store.wait(keys, timedelta(seconds=ARRIVAL))
    except RuntimeError as error:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise BadRequest(
            f"only {place.size - len(missing)} of {place.size} ranks came within {ARRIVAL:.0f} s",
            got=f"nothing from rank {', '.join(missing)}",
            do="see what those ranks printed; all must run the same command",
        ) from error
    first, *others = (json.loads(data) for data in store.multi_get(keys))
    for rank, other in enumerate((first, *others)):
        if _CANNOT in other:
            raise BadRequest(f"rank {rank} cannot take part", got=other[_CANNOT])
    for rank, other in enumerate(others, start=1):
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                raise BadRequest(
                    f"rank {rank} would compute something else than rank 0",
                    got=f"{name} {other.get(name)}",
                    wanted=f"{name} {first.get(name)}, as on rank 0",
                    do="give every rank the same command, files and versions",
                )
    return device
