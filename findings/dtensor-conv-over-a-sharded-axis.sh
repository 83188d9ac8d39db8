#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# torch DTensor: a convolution over a sharded spatial axis returns a smaller, wrong picture.
#
# A good guess: DTensor either exchanges the border rows that a 3x3 convolution needs, or gathers, or
# refuses: the global result is that of the undivided convolution.
# What happens: conv2d (and conv3d) of a tensor sharded along height, width or time return without an
# error or a warning, as a DTensor of the right shape. Gathered, it has the shape of one shard: 16 rows
# go in, 8 come out with two ranks.
# Whom it hurts: spatial or temporal parallelism of VAEs and U-Nets by "just shard the activations". Cut
# with halos by hand.
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
import torch.nn.functional as F
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

CASES = {"conv2d": (F.conv2d, (1, 3, 16, 16), (4, 3, 3, 3)),
         "conv3d": (F.conv3d, (1, 3, 8, 8, 8), (4, 3, 3, 3, 3))}


def rank_main(rank, file, queue):
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = DeviceMesh("cpu", [0, 1])
    results = []
    for name, (convolution, shape, weight_shape) in CASES.items():
        torch.manual_seed(0)
        x, weight = torch.randn(shape), torch.randn(weight_shape)
        whole = convolution(x, weight, padding=1)
        for axis in range(2, len(shape)):
            sharded = distribute_tensor(x, mesh, [Shard(axis)])
            replicated = distribute_tensor(weight, mesh, [Replicate()])
            result = convolution(sharded, replicated, padding=1)
            gathered = tuple(result.full_tensor().shape)
            results.append((name, axis, tuple(whole.shape), tuple(result.shape), gathered))
    if rank == 0:
        queue.put(results)
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank_main, (f"{sys.argv[1]}/store", queue), nprocs=2)
    for name, axis, expected, claimed, gathered in queue.get():
        print(f"{name} sharded along axis {axis}: expected {expected}, claims {claimed}, "
              f"gathers to {gathered}")
        assert gathered != expected, "the sharded axis is handled now"
PY
"$work/venv/bin/python" "$work/ranks.py" "$work"
