# SPDX-License-Identifier: Apache-2.0
"""`pw generate` on several ranks, started as torchrun does, one of which may be disturbed.

As a program: `command.py FAULT RANK PLACE generate ...`, where FAULT happens to one rank as soon
as it comes to a place in the run ("draft, step 2").
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "kernels", "export", "engines", "bench")
LIMIT = 110  # seconds


@dataclass(frozen=True)
class Ended:
    """How the ranks ended, in order."""

    codes: tuple[int, ...]
    stdout: tuple[str, ...]
    stderr: tuple[str, ...]


def run_ranks(
    count: int, *arguments: object, fault: str = "none", rank: int = -1, place: str = ""
) -> Ended:
    """Run a command line on several ranks, the last of which may have a fault."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in FOLDERS),
    }
    program = [sys.executable, "-m", "tests.parallel.command", fault, str(rank % count), place]
    children = [
        subprocess.Popen(
            [*program, *map(str, arguments)],
            env=environment | {"RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        outputs = [child.communicate(timeout=LIMIT) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return Ended(
        tuple(child.returncode for child in children),
        tuple(out for out, _ in outputs),
        tuple(err for _, err in outputs),
    )


def _main() -> None:
    fault, rank, place = sys.argv[1:4]
    sys.argv = ["pw", *sys.argv[4:]]
    if fault != "none" and os.environ["RANK"] == rank:
        _disturb(fault, place)
    from pw_runtime.cli.main import main

    main()


def _disturb(fault: str, place: str) -> None:
    from pw_runtime.system.ranks import Ranks

    at = Ranks.at

    def come_to(ranks: Ranks, where: str) -> None:
        at(ranks, where)
        if where == place:
            if fault == "raises":
                raise ValueError("something that nobody expected")
            os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)

    Ranks.at = come_to  # type: ignore[method-assign]


if __name__ == "__main__":
    _main()
