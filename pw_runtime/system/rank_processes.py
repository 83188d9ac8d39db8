# SPDX-License-Identifier: Apache-2.0
"""Start the ranks of one machine as processes, and leave none of them behind."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from pw_engines.child import child_environment

ENDING: Final = 10.0  # seconds that the other ranks have for ending after rank 0


@contextmanager
def rank_processes(
    program: Sequence[str], size: int, *, threads: int | None, piped: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], ...]]:
    """Start a program once per rank; at the end of the block, end what is left of them.

    This process holds the store through which the ranks meet, so that it outlives each of them. The
    thread that enters the block must stay in it: the processes end with that thread.

    Args:
        program: finds its place by `place_from_environment`, and calls `end_with_parent`.
        size: number of ranks.
        threads: of each; None: as the environment says.
        piped: stdin and stdout of each process are pipes to this one.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = child_environment() | {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    pipe = subprocess.PIPE if piped else None
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            mine = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # Sessions of their own: a Ctrl-C on the terminal comes to this process alone.
            ranks.append(
                subprocess.Popen(program, env=mine, stdin=pipe, stdout=pipe, start_new_session=True)
            )
        yield tuple(ranks)
    finally:
        end_ranks(ranks)
        for stream in (stream for rank in ranks for stream in (rank.stdin, rank.stdout)):
            if stream is not None:
                with suppress(OSError):  # what it did not read any more
                    stream.close()


def end_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes that are left: those that were stopped cannot do so themselves."""
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.wait(ENDING if ranks[0].poll() is not None else 0)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()
