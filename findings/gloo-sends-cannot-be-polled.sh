#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# torch.distributed, gloo: a finished send or receive says that it is not finished until it is waited for.
#
# A good guess: the handle of isend or irecv can be polled (`is_completed`) or called back
# (`get_future`), as that of an asynchronous collective on the same backend can.
# What happens: a second after the message has arrived `is_completed()` is False on both ends; it becomes
# True in `wait()` alone. `get_future()` raises "not implemented". An all_reduce does both right.
# Whom it hurts: whoever waits with a deadline, or for several messages, or watches other ranks while it
# waits: a loop over `is_completed` never ends. A broadcast in a group of two does what was wanted.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/ranks.py" <<'PY'
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def future_of(work):
    try:
        work.get_future()
    except RuntimeError as error:
        return str(error)
    return "a future"


def rank_main(rank, file, queue):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = torch.full((4,), float(rank))
    message = dist.isend(x, 1) if rank == 0 else dist.irecv(x, 0)
    time.sleep(1)
    before, future = message.is_completed(), future_of(message)
    message.wait()
    collective = dist.all_reduce(torch.ones(4), async_op=True)
    time.sleep(1)
    row = (rank, before, message.is_completed(), future, collective.is_completed(), future_of(collective))
    collective.wait()
    queue.put(row)
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank_main, (f"{sys.argv[1]}/store", queue), nprocs=2)
    for rank, before, after, future, collective, other in sorted(queue.get() for _ in range(2)):
        print(f"rank {rank}: message is_completed {before}, after wait {after}, get_future: {future}; "
              f"all_reduce is_completed {collective}, get_future: {other}")
        assert (before, after, collective, other) == (False, True, True, "a future")
        assert "not implemented" in future
PY
"$work/venv/bin/python" "$work/ranks.py" "$work"
