# SPDX-License-Identifier: Apache-2.0
"""What ranks do in tests/parallel/test_ranks.py."""

from __future__ import annotations

import os
import signal

import torch

from pw_runtime.system.ranks import Ranks


def uneven(ranks: Ranks) -> object:
    """Exchange and gather tensors of different sizes, and send some along a line."""
    group = ranks.group("some", tuple(range(ranks.size)))
    assert group is not None
    sent = [ranks.rank * other for other in range(ranks.size)]
    received = [other * ranks.rank for other in range(ranks.size)]
    x = torch.cat([torch.full((n,), 100.0 * ranks.rank + i) for i, n in enumerate(sent)])
    result = torch.empty(sum(received))
    first = ranks.exchange(group, result, x, received, sent, "numbers of a test")
    everyone = torch.empty(2 * ranks.size, dtype=torch.bfloat16)
    mine = torch.full((2,), float(ranks.rank), dtype=torch.bfloat16)
    ranks.gather(group, everyone, mine, "ranks of a test").wait()
    first.wait()
    line = torch.tensor([1.0])
    if ranks.rank:
        ranks.receive(line, ranks.rank - 1, "line of a test").wait()
    if ranks.rank + 1 < ranks.size:
        ranks.send(line + ranks.rank, ranks.rank + 1, "line of a test").wait()
    return result, everyone, line, ranks.sent


def killed(ranks: Ranks) -> object:
    """Lose the last rank in the middle."""
    return _lost(ranks, lambda: os.kill(os.getpid(), signal.SIGKILL))


def raising(ranks: Ranks) -> object:
    """Let the last rank raise an error."""

    def fail() -> None:
        raise ValueError("this rank cannot go on")

    return _lost(ranks, fail)


def diverging(ranks: Ranks) -> object:
    """Let the last rank do something else than the others."""

    def other() -> None:
        ranks.broadcast(torch.zeros(4), "something else", source=0).wait()

    return _lost(ranks, other)


def _lost(ranks: Ranks, end: object) -> object:
    ranks.at("draft 7, step 3")
    x = torch.zeros(4)
    ranks.broadcast(x, "first of a test").wait()
    if ranks.rank == ranks.size - 1:
        end()
    ranks.at("draft 7, step 4")
    ranks.broadcast(x, "second of a test", source=ranks.size - 1).wait()
    return "nothing was noticed"
