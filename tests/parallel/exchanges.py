# SPDX-License-Identifier: Apache-2.0
"""What ranks do in tests/parallel/test_ranks.py."""

from __future__ import annotations

import os
import signal
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist

from pw_runtime.execution.divided_transformer import form_groups
from pw_runtime.job import follow as follow_module
from pw_runtime.job.follow import on_all_ranks
from pw_runtime.system import rank_watch
from pw_runtime.system import ranks as ranks_module
from pw_runtime.system.ranks import Ranks
from pw_runtime.types import Split, TransformerPlan

NCCL = """NCCL error in: x.cpp:1, unhandled cuda error
Last error:
Cuda failure 2 'out of memory'
Exception raised from a library (most recent call first):
frame #0: a function"""
HASTE: dict[str, Any] = {"SILENCE": 6.0, "BEAT": 0.25}  # seconds: a busy machine beats in time


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


def refused(ranks: Ranks) -> object:
    """Have the library refuse to begin an exchange on the last rank; none is gone."""

    def begin() -> None:
        with (
            patch.object(ranks_module, "_LEARN", 0.0),
            patch.object(dist, "broadcast", side_effect=RuntimeError(NCCL)),
        ):
            ranks.broadcast(torch.zeros(4), "second of a test")

    return _lost(ranks, begin)


def ahead(ranks: Ranks) -> object:
    """Let the last rank wait for rank 0 in a command that rank 0 has done with."""
    with patch.multiple(rank_watch, **HASTE):
        if ranks.rank == 0:
            ranks.command("decode")
            ranks.at("draft 7, step 4")
            ranks.command("end")
        else:
            ranks.next_command()
            ranks.at("draft 7, step 3")
            if ranks.rank == ranks.size - 1:
                ranks.receive(torch.zeros(4), 0, "word of a test", patient=True).wait()
            ranks.next_command()
    return "nothing was noticed"


def busy(ranks: Ranks) -> object:
    """Keep rank 3 from its next command until the others have waited longer than a silence.

    Commands go from rank 0 to ranks 1 and 2, and from rank 1 to rank 3: rank 1 has nothing of the
    next one to pass on, rank 0 half of it to send, and rank 2 all of it to answer.
    """
    answer = torch.zeros(1)
    with patch.multiple(rank_watch, **HASTE):
        if ranks.rank == 0:
            ranks.command("verify")
            ranks.command("load")
            for rank in range(1, ranks.size):
                ranks.receive(answer, rank, "answer of a rank", patient=True).wait()
            ranks.command("end")
            return "end"
        ranks.next_command()
        watch, beats = ranks._watch, 0
        while ranks.rank == 3 and not ranks.failed and beats < 34:
            watch._closed.wait(0.05)
            beats = watch._last.get(0, {"number": 0})["number"]
        ranks.next_command()
        ranks.send(answer, 0, "answer of a rank").wait()
        return ranks.next_command()["name"]


def short_of_memory(ranks: Ranks) -> object:
    """Load a network twice; another rank has no memory for its engines the first time."""
    plan = TransformerPlan(split=Split(guidance=1, sequence=2))
    if ranks.rank == 0:
        ends = [_loaded(ranks, plan), _loaded(ranks, plan)]
        ranks.command("end")
        return ends
    given: list[object] = [MemoryError("no memory for engines"), SimpleNamespace(digest="")]
    request: Any = SimpleNamespace(options=None, preset=None, device=torch.device("cpu"))
    bundle: Any = None
    with (
        patch.object(follow_module, "select_engines", Mock(side_effect=given)),
        patch.object(follow_module, "load_divided", _groups_of),
    ):
        follow_module.follow(ranks, request, bundle)
    return None


def _loaded(ranks: Ranks, plan: TransformerPlan) -> str:
    """Have all ranks load a network, of which only the groups are formed."""
    try:
        with on_all_ranks(ranks, "load", stage="draft", plan=asdict(plan), engines=""):
            form_groups(ranks, plan.split)
    except torch.OutOfMemoryError as error:
        return str(error)
    return "loaded"


def _groups_of(
    bundle: object, stage: str, engines: object, plan: Any, options: object, ranks: Ranks
) -> None:
    form_groups(ranks, plan.split)


def _lost(ranks: Ranks, end: object) -> object:
    ranks.at("draft 7, step 3")
    x = torch.zeros(4)
    ranks.broadcast(x, "first of a test").wait()
    if ranks.rank == ranks.size - 1:
        end()
    ranks.at("draft 7, step 4")
    ranks.broadcast(x, "second of a test", source=ranks.size - 1).wait()
    return "nothing was noticed"
