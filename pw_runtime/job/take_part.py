# SPDX-License-Identifier: Apache-2.0
"""The part of one process in a run of several: rank 0 runs the program, the others follow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from pw_kernels.attention.libraries import available
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import BadRequest, PixelWizardError, RankFailed
from pw_runtime.job.follow import follow, identity_of
from pw_runtime.job.preflight import computing, held_by, selected, settled
from pw_runtime.system.rank_meeting import Place, joined
from pw_runtime.system.ranks import DEADLINE, Ranks
from pw_runtime.types import Request

Result = TypeVar("Result")


def take_part(
    place: Place,
    prepare: Callable[[], tuple[Request, Bundle]],
    run: Callable[[Request, Bundle, Ranks], Result],
    *,
    say: Callable[[str], None],
    deadline: float = DEADLINE,
    ended: Callable[[Ranks], None] = lambda ranks: None,
) -> Result | None:
    """Meet the other ranks; run the program as rank 0, or follow it to its end.

    Args:
        place: of this process among the ranks.
        prepare: returns the request, whose device is this rank's, and the bundle. The other ranks
            are told what it raises.
        run: the program of rank 0; it may make several runs, one after another.
        say: reports progress.
        deadline: seconds that one rank waits for the data of another.
        ended: is given the ranks at the end of the program, on each of them.

    Returns:
        What `run` returns; None on all other ranks.

    Raises:
        BadRequest: a rank does not come, cannot take part, or would compute something else.
        RankFailed: a rank died.
    """
    known: list[tuple[Request, Bundle, int]] = []

    def prepared() -> tuple[torch.device, dict[str, str]]:
        request, bundle = prepare()
        # Settled on every rank before they are compared: it depends on a rank's compiler and GPU.
        # Attention depends on a clock as well: rank 0 measures it for all, and it is compared as
        # it was asked for.
        request = replace(request, options=request.options.resolved())
        asked, engines = request.options, selected(request, bundle)
        options = settled(request, bundle, say, measure_here=place.rank == 0)
        request = replace(request, options=options)
        known.append((request, bundle, held_by(engines)))
        if request.device.type == "cuda":
            torch.cuda.set_device(request.device)
        compared = replace(request, options=replace(options, attention=asked.attention))
        return request.device, identity_of(compared, bundle)

    with joined(place, prepared, deadline=deadline) as ranks:
        request, bundle, held = known[0]
        request = _with_common_attention(ranks, request)
        if place.rank:
            with computing(request.options):
                follow(ranks, request, bundle, held)
            ended(ranks)
            return None
        result = run(request, bundle, ranks)
        ranks.command("end")
        ended(ranks)
        return result


def _with_common_attention(ranks: Ranks, request: Request) -> Request:
    """Have all ranks compute attention as rank 0 has settled it. Raises BadRequest."""
    chosen = request.options.attention
    if ranks.rank == 0:
        ranks.command("attention", chosen=chosen)
        return request
    chosen = ranks.next_command()["chosen"]
    if not available(chosen):
        raise BadRequest(
            f"rank {ranks.rank} cannot run the attention that rank 0 chose",
            got=f"{chosen} is not installed",
            do=f"pip install {chosen} there, or choose another one with --attention",
        )
    return replace(request, options=replace(request.options, attention=chosen))


def tells(rank: int, error: PixelWizardError) -> bool:
    """Tell whether this rank tells the user of an error that ended the run."""
    return rank in (0, error.teller if isinstance(error, RankFailed) else 0)
