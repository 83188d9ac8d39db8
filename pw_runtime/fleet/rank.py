# SPDX-License-Identifier: Apache-2.0
"""The program of a rank of a worker: `python -m pw_runtime.fleet.rank`, started by group.py.

It reads a Part and then orders from stdin, and writes what it found and what happens to stdout,
until stdin is closed. Every rank gets the first order, and prepares for what it says; the later
ones, which differ in their prompts alone, go to rank 0, which the others follow.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from pw_engines.child import end_with_parent
from pw_runtime.errors import BadRequest, BadWeights, PixelWizardError, RankFailed
from pw_runtime.fleet.batch import found_here, make_batch
from pw_runtime.fleet.messages import Ended, Event, Found, Order, Part, Said

if TYPE_CHECKING:
    from pw_runtime.checkpoint.bundle import Bundle
    from pw_runtime.system.rank_meeting import Place
    from pw_runtime.system.ranks import Ranks
    from pw_runtime.types import Request

Tell = Callable[[Event | Found | PixelWizardError], None]


class BatchBroke(Exception):
    """A batch ended in a way after which the other ranks cannot follow another one."""


def main() -> None:
    """Run a rank, and end the process."""
    end_with_parent()
    # What libraries print must not come between the messages.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(message: Event | Found | PixelWizardError) -> None:
        pickle.dump(message, answers)
        answers.flush()

    from pw_runtime.system.rank_meeting import place_from_environment
    from pw_runtime.system.ranks import broken

    place = place_from_environment()
    assert place is not None, "a group has at least two ranks"
    code = 1
    try:
        _live(place, tell)
        code = 0
    except BatchBroke:
        pass  # it is told
    except BaseException:  # the others are told by rank_watch.py; this is for the worker's log
        traceback.print_exc()
    if broken():
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _live(place: Place, tell: Tell) -> None:
    """Prepare, and make batches until there is no further order."""
    from pw_runtime.checkpoint.bundle import open_bundle
    from pw_runtime.checkpoint.lora import with_loras
    from pw_runtime.job.checks import pick_device
    from pw_runtime.job.take_part import take_part, tells

    part: Part = pickle.load(sys.stdin.buffer)
    try:
        bundle = with_loras(open_bundle(part.model), part.loras)
        device = pick_device(part.options.device)
        own = f"cuda:{place.local}" if device.type == "cuda" else str(device)
        tell(found_here(pick_device(own)))
    except PixelWizardError as error:
        tell(error)
        return
    first = _next_order()
    if first is None:
        return
    options = replace(first.request.options, device=own)

    def make_batches(request: Request, bundle: Bundle, ranks: Ranks) -> None:
        order: Order | None = first
        while order is not None:
            same = replace(request, prompts=order.request.prompts, out=order.request.out)
            ended = make_batch(replace(order, request=same), bundle, tell, ranks=ranks)
            tell(ended)
            if ended.error is not None:
                raise BatchBroke(ended.error)
            order = _next_order()

    try:
        take_part(
            place,
            lambda: (replace(first.request, options=options), bundle),
            make_batches,
            say=lambda text: tell(Said(text)) if place.rank == 0 else None,
        )
    except PixelWizardError as error:
        if tells(place.rank, error):
            text = error.what if isinstance(error, RankFailed) else str(error)
            bad_input = isinstance(error, BadRequest | BadWeights)
            tell(Ended(text, bad_input, lost=not bad_input))
        raise


def _next_order() -> Order | None:
    """Wait for the next order; None: there is none."""
    try:
        order: Order = pickle.load(sys.stdin.buffer)
    except EOFError:
        return None
    return order


if __name__ == "__main__":
    main()
