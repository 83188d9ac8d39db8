# SPDX-License-Identifier: Apache-2.0
"""`pw generate` on several ranks, placed as torchrun does, one of which may be disturbed.

One program imports what they need and forks them, so that this is paid once:
`command.py FOLDER COUNT FAULT RANK PLACE generate ...`. The fault happens to one rank as soon as it
comes to a place in the run ("draft, step 2"). "tells" is none: the rank prints the commands of
rank 0 on stderr.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "kernels", "export", "engines", "bench")
LIMIT = 200  # seconds
SILENCE = 8.0  # seconds: in tests a rank is given up sooner


@dataclass(frozen=True)
class Ended:
    """How the ranks ended, in order."""

    codes: tuple[int, ...]
    stdout: tuple[str, ...]
    stderr: tuple[str, ...]


def run_ranks(
    count: int, *arguments: object, fault: str = "none", rank: int = 0, place: str = ""
) -> Ended:
    """Run a command line on several ranks, of which one may have a fault."""
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
    with tempfile.TemporaryDirectory() as folder:
        program = [
            sys.executable,
            "-m",
            "tests.parallel.command",
            folder,
            count,
            fault,
            rank,
            place,
        ]
        log = Path(folder) / "log"
        with log.open("w") as output:
            subprocess.run(
                [str(part) for part in (*program, *arguments)],
                env=environment,
                stdout=output,
                stderr=output,
                timeout=LIMIT,
                check=False,
            )
        files = [Path(folder) / f"{number}" for number in range(count)]
        assert all(file.with_suffix(".code").exists() for file in files), log.read_text()
        return Ended(
            tuple(int(file.with_suffix(".code").read_text()) for file in files),
            tuple(file.with_suffix(".out").read_text() for file in files),
            tuple(file.with_suffix(".err").read_text() for file in files),
        )


def _main() -> None:
    folder, count, fault, disturbed, place = sys.argv[1:6]
    sys.argv = ["pw", *sys.argv[6:]]
    from pw_runtime import pipeline
    from pw_runtime.cli.main import main
    from pw_runtime.system import rank_watch

    assert pipeline.STAGES, "imported before the fork"

    rank_watch.SILENCE = SILENCE  # type: ignore[misc]
    children = []
    for rank in range(int(count)):
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for number, ending in ((1, "out"), (2, "err")):
                file = os.open(f"{folder}/{rank}.{ending}", os.O_CREAT | os.O_WRONLY, 0o600)
                os.dup2(file, number)
            if fault != "none" and str(rank) == disturbed:
                _disturb(fault, place)
            main()
        children.append(child)
    for rank, child in enumerate(children):
        _, status = os.waitpid(child, 0)
        Path(folder, f"{rank}.code").write_text(str(os.waitstatus_to_exitcode(status)))


def _disturb(fault: str, place: str) -> None:
    from pw_runtime.system.ranks import Ranks

    at, next_command = Ranks.at, Ranks.next_command

    def told(ranks: Ranks) -> dict[str, Any]:
        command = next_command(ranks)
        print(command["name"].replace(" ", "-"), file=sys.stderr, flush=True)
        return command

    if fault == "tells":
        Ranks.next_command = told  # type: ignore[method-assign]
        return

    def come_to(ranks: Ranks, where: str) -> None:
        at(ranks, where)
        if where == place:
            if fault == "raises":
                raise ValueError("something that nobody expected")
            os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)

    Ranks.at = come_to  # type: ignore[method-assign]


if __name__ == "__main__":
    _main()
