# SPDX-License-Identifier: Apache-2.0
"""Ranks on this machine, for tests: processes that one small program forks.

`run` starts a program that imports what the tests need and has computed nothing (a fork after
OpenMP has run would hang); it forks one process per rank, which all call a function of a module of
tests. Results come back through files, which torch writes and reads.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pw_runtime.system import ranks as ranks_module
from pw_runtime.system.rank_watch import RankWatch, connect
from pw_runtime.system.ranks import Ranks

ROOT = Path(__file__).parents[2]
LIMIT = 200  # seconds


def run(
    function: str, folder: Path, counts: Sequence[int], *arguments: str
) -> dict[int, list[Any]]:
    """Call `tests.MODULE:NAME` with (ranks, *arguments) on every rank, for each count of ranks.

    Returns what the ranks return, by count, in order; an exception as its text, None of a rank
    that was killed.
    """
    program = [sys.executable, "-m", "tests.parallel.ranks", function, str(folder)]
    program += [",".join(map(str, counts)), *arguments]
    paths = [str(ROOT), *(str(ROOT / name) for name in ("kernels", "export", "engines", "bench"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        program, env=environment, timeout=LIMIT, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        count: [
            torch.load(path, weights_only=False) if path.exists() else None
            for path in (folder / f"{count}-{rank}.pt" for rank in range(count))
        ]
        for count in counts
    }


@contextmanager
def rank_of(listener: socket.socket, rank: int, size: int) -> Iterator[Ranks]:
    """Join the other forked ranks."""
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=rank == 0,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
        master_listen_fd=os.dup(listener.fileno()) if rank == 0 else None,
    )
    watch = RankWatch(connect("127.0.0.1", port, 30), rank, size)
    store.set(f"here {rank}", "")
    store.wait([f"here {other}" for other in range(size)], timedelta(seconds=30))
    watch.start()
    ranks = Ranks(store, watch, rank, size, torch.device("cpu"))
    try:
        yield ranks
        ranks.broadcast(torch.zeros(1), "end").wait()
    except BaseException as error:
        if not isinstance(error, ranks_module.RankFailed):
            ranks.fail(error)
        raise
    finally:
        ranks.close()


def _child(
    listener: socket.socket, rank: int, size: int, function: str, out: Path, arguments: list[str]
) -> None:
    signal.alarm(LIMIT)
    torch.set_num_threads(1)
    result: Any
    try:
        module, name = function.split(":")
        call = getattr(importlib.import_module(module), name)
        with rank_of(listener, rank, size) as ranks, torch.inference_mode():
            result = call(ranks, *arguments)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    torch.save(result, out / f"{size}-{rank}.pt")
    sys.stderr.flush()
    os._exit(0)


def _main() -> None:
    function, folder, counts, *arguments = sys.argv[1:]
    importlib.import_module(function.split(":")[0])
    for size in map(int, counts.split(",")):
        listener = socket.create_server(("127.0.0.1", 0))
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                _child(listener, rank, size, function, Path(folder), arguments)
            children.append(child)
        listener.close()
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    _main()
