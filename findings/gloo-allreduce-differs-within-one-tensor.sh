#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# torch.distributed over gloo: all_reduce adds in an order that depends on an element's position.
#
# A good guess: every element is the sum over ranks in rank order (or at least in one order), so equal
# inputs give equal outputs, and a single process that adds the same tensors gets the same bits.
# What happens: from three ranks on, the tensor is cut into blocks whose sums start at different
# ranks. In bf16, four ranks that contribute 256, 1, 1 and 1 at every position get 256 at some
# positions and 260 at others; in fp32 a fifth (3 ranks) to a third (4 ranks) of random sums differ
# from the sum in rank order. All ranks agree with each other.
# Whom it hurts: multi-process runs on CPUs that must equal a run of one process (tensor parallelism,
# sharded decoders), and reference results computed with gloo. Gather and add in a fixed order where
# bits matter.
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


def rank_main(rank, ranks, file, queue):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    constant = torch.full((1000,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    dist.all_reduce(constant)
    parts = [torch.randn(10007, generator=torch.Generator().manual_seed(r)) for r in range(ranks)]
    reduced = parts[rank].clone()
    dist.all_reduce(reduced)
    in_order = parts[0].clone()
    for part in parts[1:]:
        in_order += part
    if rank == 0:
        queue.put((sorted(set(constant.tolist())), float((reduced != in_order).float().mean())))
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", torch.__version__)
    seen = {}
    for ranks in (2, 3, 4):
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(rank_main, (ranks, f"{sys.argv[1]}/store{ranks}", queue), nprocs=ranks)
        seen[ranks] = queue.get()
        values, share = seen[ranks]
        print(f"{ranks} ranks: one bf16 sum is {values}; fp32: {share:.0%} differ from rank order")
    assert seen[2] == ([256.0], 0.0)
    assert seen[4][0] == [256.0, 260.0] and seen[4][1] > 0.1, "the order has become uniform"
PY
"$work/venv/bin/python" "$work/ranks.py" "$work"
