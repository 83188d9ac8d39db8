#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# torch.distributed, gloo: all_to_all over lists refuses parts of different sizes, all_to_all_single takes
# them.
#
# A good guess: the form with lists is the one for uneven parts (each tensor has its own shape), as it is
# with NCCL, and the form with one tensor the special case.
# What happens: all_to_all with parts of 2 and 3 numbers raises "invalid tensor size at index 1 (expected
# (2), got (3))" on both ranks; all_to_all_single with split sizes 2 and 3 moves the same data.
# Whom it hurts: sequence parallelism whose tokens or heads do not divide by the ranks, written for NCCL
# and tested on a CPU. Use all_to_all_single with split sizes on both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > "$work/ranks.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZES = (2, 3)  # numbers that go to rank 0 and to rank 1, from each


def rank_main(rank, file, queue):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mine = SIZES[rank]
    parts = [torch.full((size,), float(rank)) for size in SIZES]
    try:
        dist.all_to_all([torch.empty(mine), torch.empty(mine)], parts)
        listed = "moved"
    except RuntimeError as error:
        listed = str(error)
    result = torch.empty(2 * mine)
    dist.all_to_all_single(result, torch.cat(parts), [mine, mine], list(SIZES))
    queue.put((rank, listed, result.tolist()))
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank_main, (f"{sys.argv[1]}/store", queue), nprocs=2)
    for rank, listed, single in sorted(queue.get() for _ in range(2)):
        print(f"rank {rank}: all_to_all: {listed}; all_to_all_single: {single}")
        assert "invalid tensor size" in listed, "uneven lists are taken now"
        assert single == [0.0] * SIZES[rank] + [1.0] * SIZES[rank]
PY
"$work/venv/bin/python" "$work/ranks.py" "$work"
