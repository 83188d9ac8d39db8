# SPDX-License-Identifier: Apache-2.0
"""The ranks other than the first: rank 0 runs the program, they compute their parts of it.

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
from pw_runtime.checkpoint.loader import load_decoder
from pw_runtime.errors import BadRequest
from pw_runtime.execution.decoder_lookup import on_engines, select_decoder_engines
from pw_runtime.execution.divided_transformer import DividedDiT, form_groups, load_divided
from pw_runtime.execution.engine_lookup import EngineSet, select_engines
from pw_runtime.execution.protocols import Decoder
from pw_runtime.job.receipt import versions
from pw_runtime.models import VaeDecoder
from pw_runtime.planning.oom_fallback import free_memory, out_of_memory
from pw_runtime.planning.workload import budget_of
from pw_runtime.stages.decode import decode_share
from pw_runtime.system.ranks import Ranks
from pw_runtime.types import (
    Budget,
    Compat,
    DecodePlan,
    Latent,
    PixelFormat,
    Request,
    TilingConfig,
    TransformerPlan,
)

_PLAN, _TILING, _COMPAT = (
    TypeAdapter(TransformerPlan),
    TypeAdapter(TilingConfig),
    TypeAdapter(Compat),
)
_READY, _NO_MEMORY = 0, 1  # answers of a rank to a command that loads


def identity_of(request: Request, bundle: Bundle) -> dict[str, str]:
    """Return everything that must be equal on all ranks for their parts to fit together."""
    options = asdict(replace(request.options, device=request.device.type))
    device = "cpu"
    if request.device.type == "cuda":
        device = torch.cuda.get_device_name(request.device)
    preset = hashlib.sha256(json.dumps(asdict(request.preset), sort_keys=True).encode())
    return {
        "bundle": bundle.weights_digest,
        "preset": preset.hexdigest()[:16],
        "options": json.dumps(options, sort_keys=True),
        "device": device,
        "threads": str(torch.get_num_threads()),
        **versions(),
    }


def follow(ranks: Ranks, request: Request, bundle: Bundle, held: int = 0) -> None:
    """Obey the commands of rank 0 until it has ended.

    Args:
        ranks: this one and the others.
        request: as on rank 0, but for the device.
        bundle: as on rank 0.
        held: bytes of the device that this rank's engines have taken.

    Raises:
        RankFailed: another rank died.
        BadRequest, BadWeights: this rank's files cannot work.
    """
    follower = _Follower(ranks, request, bundle, held)
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
            ranks.receive(answer, rank, "answer of a rank", patient=True).wait()
    short = [rank for rank, answer in enumerate(answers, start=1) if int(answer) == _NO_MEMORY]
    if short:
        raise torch.OutOfMemoryError(f"out of memory on rank {', '.join(map(str, short))}")


def tell_of_decode(
    ranks: Ranks,
    plan: DecodePlan,
    compat: Compat,
    pixels: PixelFormat,
    latent: Latent,
    engines: EngineSet,
) -> None:
    """Have all ranks begin to decode a clip; rank 0 then calls `decode_frames`."""
    ranks.command(
        "decode",
        tiling=asdict(plan.tiling),
        compat=asdict(compat),
        pixels=pixels,
        shape=list(latent.x.shape),
        engines=engines.digest if plan.engines else None,
    )
    ranks.at("decode")
    ranks.broadcast(latent.x.contiguous().view(-1), "latent of a clip").wait()


def common_budget(ranks: Ranks, request: Request, held: int) -> Budget:
    """Return the budget of all ranks together; rank 0 calls it.

    Its engines have taken `held` bytes of its device. The device of the budget is the one with the
    least memory. Plans count the host memory of all ranks: it is that of the scarcest machine, as
    if all of them were there.
    """
    ranks.command("budget")
    rows = _budgets(ranks, request, held).tolist()
    here = [sum(other[2] == row[2] for other in rows) for row in rows]
    host = min(row[0] * ranks.size // count for row, count in zip(rows, here, strict=True))
    device = min(row[1] for row in rows)
    return Budget(host=host, device=None if device < 0 else device)


def _budgets(ranks: Ranks, request: Request, held: int) -> torch.Tensor:
    """Collect from every rank: [ranks, 3] bytes of the host, of the device, and its machine."""
    limits = request.gpu_memory, request.host_memory
    mine = budget_of(request.device, *limits, ranks=ranks.size, held=held)
    host = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7])
    entry = torch.tensor([mine.host, -1 if mine.device is None else mine.device, host])
    table = torch.empty(3 * ranks.size, dtype=torch.int64)
    ranks.gather(ranks.all, table, entry, "budget of a rank").wait()
    return table.view(-1, 3)


class _Follower:
    """State of a rank between commands."""

    def __init__(self, ranks: Ranks, request: Request, bundle: Bundle, held: int) -> None:
        self._ranks, self._request, self._bundle, self._held = ranks, request, bundle, held
        self._transformer: DividedDiT | None = None
        self._decoder: VaeDecoder | None = None
        self._verifies = False  # the files of its machine, which rank 0 does not see

    def obey(self, command: Mapping[str, Any]) -> None:
        """Do what rank 0 does."""
        match command["name"]:
            case "budget":
                hosts = _budgets(self._ranks, self._request, self._held)[:, 2].tolist()
                mine = hosts.index(hosts[self._ranks.rank])
                self._verifies = mine == self._ranks.rank
            case "verify" if self._verifies:
                self._ranks.at("checking the files")
                verify(self._bundle)
            case "load":
                self._ranks.at(f"{command['stage']}, loading")
                self._answer(lambda: self._load(command))
            case "load decoder":
                self._ranks.at("decode, loading")
                self._answer(self._load_decoder)
            case "decode":
                self._decode(command)
            case "release":
                self._release()
            case _:
                if self._transformer is not None:
                    self._transformer.follow(command)

    def _load(self, command: Mapping[str, Any]) -> None:
        stage, options = command["stage"], self._request.options
        plan = _PLAN.validate_python(command["plan"])
        # First, as rank 0 does: it would wait for days where this rank has no memory for engines.
        form_groups(self._ranks, plan.split)
        engines = select_engines(self._bundle, stage, options, self._request.preset)
        self._require_same(engines, f"{stage} network", command["engines"])
        self._transformer = load_divided(self._bundle, stage, engines, plan, options, self._ranks)

    def _load_decoder(self) -> None:
        request = self._request
        precision = request.options.vae_precision
        self._decoder = load_decoder(self._bundle, request.device, precision)

    def _decode(self, command: Mapping[str, Any]) -> None:
        request, decoder = self._request, self._decoder
        assert decoder is not None
        x = torch.empty(command["shape"], device=request.device)
        self._ranks.at("decode")
        self._ranks.broadcast(x.view(-1), "latent of a clip").wait()
        part: Decoder = decoder
        if command["engines"] is not None:
            engines = select_decoder_engines(self._bundle, request.preset, request.options)
            self._require_same(engines, "decoder", command["engines"])
            part = on_engines(decoder, engines)
        decode_share(
            part,
            Latent(x=x),
            _TILING.validate_python(command["tiling"]),
            _COMPAT.validate_python(command["compat"]),
            command["pixels"],
            ranks=self._ranks,
        )

    def _require_same(self, engines: EngineSet, network: str, wanted: str) -> None:
        """Raise BadRequest for engines that are not those of rank 0."""
        if engines.digest != wanted:
            raise BadRequest(
                f"rank {self._ranks.rank} has other engines for the {network} than rank 0",
                got=engines.digest or engines.reason,
                wanted=wanted,
                do="copy the engines of rank 0 there, or add --policy eager",
            )

    def _answer(self, load: Callable[[], None]) -> None:
        """Load something, and tell rank 0 whether there is memory for it."""
        answer = _READY
        self._release()  # the network of an attempt for which another rank had too little memory
        try:
            load()
        except Exception as error:
            if out_of_memory(error) is None:
                raise
            answer = _NO_MEMORY
        if answer == _NO_MEMORY:  # outside the block, whose exception holds tensors
            self._release()
        self._ranks.send(torch.tensor([answer]), 0, "answer of a rank").wait()

    def _release(self) -> None:
        if self._transformer is not None:
            self._transformer.close()
        self._transformer = self._decoder = None
        free_memory(self._request.device)
