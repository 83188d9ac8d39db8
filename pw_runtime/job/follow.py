# SPDX-License-Identifier: Apache-2.0
"""What the ranks other than the first do: rank 0 runs the program, they compute their parts of it.

Rank 0 has the prompts, the solver's state, the files and the encoder; the others know the bundle,
the preset and the options, and wait for commands.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from pydantic import TypeAdapter

from pw_runtime.checkpoint.bundle import Bundle, verify
from pw_runtime.errors import BadRequest
from pw_runtime.execution.divided_transformer import DividedDiT, load_divided
from pw_runtime.execution.engine_lookup import select_engines
from pw_runtime.job.receipt import versions
from pw_runtime.planning.oom_fallback import free_memory, out_of_memory
from pw_runtime.planning.workload import budget_of
from pw_runtime.system.ranks import Ranks
from pw_runtime.types import Budget, Request, TransformerPlan

_PLAN = TypeAdapter(TransformerPlan)
_READY, _NO_MEMORY = 0, 1  # answers of a rank to a command that loads


def identity_of(request: Request, bundle: Bundle) -> dict[str, str]:
    """Return everything that must be equal on all ranks for their parts to fit together."""
    options = asdict(replace(request.options, device=request.device.type))
    device = "cpu"
    if request.device.type == "cuda":
        device = torch.cuda.get_device_name(request.device)
    preset = hashlib.sha256(json.dumps(asdict(request.preset), sort_keys=True).encode())
    return {
        "bundle": bundle.digest,
        "preset": preset.hexdigest()[:16],
        "options": json.dumps(options, sort_keys=True),
        "device": device,
        "threads": str(torch.get_num_threads()),
        **versions(),
    }


def follow(ranks: Ranks, request: Request, bundle: Bundle) -> None:
    """Obey the commands of rank 0 until it has ended.

    Raises:
        RankFailed: another rank died.
        BadRequest, BadWeights: this rank's files cannot work.
    """
    follower = _Follower(ranks, request, bundle)
    while (command := ranks.next_command())["name"] != "end":
        follower.obey(command)


@contextmanager
def on_all_ranks(ranks: Ranks, command: str, **details: Any) -> Iterator[None]:
    """Have all ranks load something while the block does so on rank 0.

    Raises torch.OutOfMemoryError where another rank has too little memory for it.
    """
    ranks.command(command, **details)
    try:
        yield
    finally:
        answers = [torch.empty(1, dtype=torch.int64) for _ in range(1, ranks.size)]
        for rank, answer in enumerate(answers, start=1):
            ranks.receive(answer, rank, f"answer to {command}").wait()
    short = [rank for rank, answer in enumerate(answers, start=1) if int(answer) == _NO_MEMORY]
    if short:
        raise torch.OutOfMemoryError(f"out of memory on rank {', '.join(map(str, short))}")


def common_budget(ranks: Ranks, request: Request) -> Budget:
    """Return the budget of all ranks together; rank 0 calls it.

    The device is the one with the least memory. Plans count the host memory of all ranks: it is
    that of the scarcest machine, as if all of them were there.
    """
    ranks.command("budget")
    rows = _budgets(ranks, request).tolist()
    here = [sum(other[2] == row[2] for other in rows) for row in rows]
    host = min(row[0] * ranks.size // count for row, count in zip(rows, here, strict=True))
    device = min(row[1] for row in rows)
    return Budget(host=host, device=None if device < 0 else device)


def _budgets(ranks: Ranks, request: Request) -> torch.Tensor:
    """Collect from every rank: [ranks, 3] bytes of the host, of the device, and its machine."""
    limits = request.gpu_memory, request.host_memory
    mine = budget_of(request.device, *limits, ranks=ranks.size)
    host = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7])
    entry = torch.tensor([mine.host, -1 if mine.device is None else mine.device, host])
    table = torch.empty(3 * ranks.size, dtype=torch.int64)
    ranks.gather(ranks.all, table, entry, "budget of a rank").wait()
    return table.view(-1, 3)


class _Follower:
    """State of a rank between commands."""

    def __init__(self, ranks: Ranks, request: Request, bundle: Bundle) -> None:
        self._ranks, self._request, self._bundle = ranks, request, bundle
        self._transformer: DividedDiT | None = None
        self._verifies = False  # the files of its machine, which rank 0 does not see

    def obey(self, command: Mapping[str, Any]) -> None:
        """Do what rank 0 does."""
        match command["name"]:
            case "budget":
                hosts = _budgets(self._ranks, self._request)[:, 2].tolist()
                mine = hosts.index(hosts[self._ranks.rank])
                self._verifies = mine == self._ranks.rank
            case "verify" if self._verifies:
                self._ranks.at("checking the files")
                verify(self._bundle)
            case "load":
                self._ranks.at(f"{command['stage']}, loading")
                self._answer(lambda: self._load(command))
            case "release":
                self._release()
            case _:
                if self._transformer is not None:
                    self._transformer.follow(command)

    def _load(self, command: Mapping[str, Any]) -> None:
        stage, options = command["stage"], self._request.options
        engines = select_engines(self._bundle, stage, options, self._request.preset)
        if engines.digest != command["engines"]:
            raise BadRequest(
                f"rank {self._ranks.rank} has other engines for the {stage} network than rank 0",
                got=engines.digest,
                wanted=command["engines"],
                do="copy the engines of rank 0 there, or add --policy eager",
            )
        plan = _PLAN.validate_python(command["plan"])
        self._transformer = load_divided(self._bundle, stage, engines, plan, options, self._ranks)

    def _answer(self, load: Callable[[], None]) -> None:
        """Load something, and tell rank 0 whether there is memory for it."""
        answer = _READY
        try:
            load()
        except Exception as error:
            if out_of_memory(error) is None:
                raise
            answer = _NO_MEMORY
        if answer == _NO_MEMORY:  # outside the block, whose exception holds tensors
            self._release()
        self._ranks.send(torch.tensor([answer]), 0, "answer to load").wait()

    def _release(self) -> None:
        if self._transformer is not None:
            self._transformer.close()
        self._transformer = None
        free_memory(self._request.device)
