# SPDX-License-Identifier: Apache-2.0
"""A worker's group of ranks: processes of its machine, one per device, that stay with it.

They start once, and join once, with the first batch; each is told what to do through its stdin and
answers through its stdout (rank.py). A group in which a rank died is over, and its worker with it.
"""

from __future__ import annotations

import pickle
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final

from pw_runtime.errors import PixelWizardError
from pw_runtime.fleet.messages import Ended, Event, Found, Order, Part
from pw_runtime.system.own_program import own_program
from pw_runtime.system.rank_processes import end_ranks, rank_processes

RANK: Final = "pw_runtime.fleet.rank"


class GroupLost(Exception):
    """A rank ended before all of them had answered."""


class Group:
    """The ranks of a worker, as the worker sees them."""

    def __init__(self, size: int, put: Callable[[Event], None]) -> None:
        """Take how many ranks there will be; `put` gets the events of every batch."""
        self._size, self._put = size, put
        self._ranks: tuple[subprocess.Popen[bytes], ...] = ()
        self._ordered = False
        self._ending = False
        self._found: Future[tuple[Found, ...]] = Future()
        self._thread: threading.Thread | None = None

    def join(self, part: Part) -> tuple[Found, ...]:
        """Start the ranks and wait for what they find, which takes as long as importing torch.

        Raises:
            PixelWizardError: a rank cannot take part.
            GroupLost: a rank ended without a word.
        """
        import torch

        # Here: to OpenMP, each thread of a process has a number of its own.
        threads = max(1, torch.get_num_threads() // self._size)
        self._thread = threading.Thread(target=self._live, args=(part, threads), daemon=True)
        self._thread.start()
        return self._found.result()

    def start(self, order: Order) -> None:
        """Have the ranks make a batch. Where one has died, its end is told as the batch's."""
        # The first one also tells the other ranks what to prepare for; they then follow rank 0.
        for rank in self._ranks[:1] if self._ordered else self._ranks:
            with suppress(OSError):
                _send(rank, order)
        self._ordered = True

    def end(self) -> None:
        """End the ranks, and wait until they have."""
        self._ending = True
        for rank in self._ranks:
            with suppress(OSError):
                _stdin(rank).close()
        if self._thread is not None:
            self._thread.join()

    def _live(self, part: Part, threads: int) -> None:
        """Start the ranks, pass on what they tell, and end them; they live as this thread does."""
        told: Event | None = None
        try:
            with rank_processes(
                own_program(RANK), self._size, threads=threads, piped=True
            ) as ranks:
                self._ranks = ranks
                self._found.set_result(self._answers(part))
                for told in _received(ranks[0]):
                    self._put(told)
                end_ranks(ranks)
                is_told = isinstance(told, Ended) and told.error is not None
                if not (is_told or self._ending):
                    self._put(self._last_words())
        except BaseException as error:
            if self._found.done():
                self._put(Ended(f"the worker lost its ranks: {error}", lost=True))
            else:
                self._found.set_exception(error)

    def _answers(self, part: Part) -> tuple[Found, ...]:
        """Tell the ranks their parts and return what they find. Raises what a rank raised."""
        for rank in self._ranks:
            with suppress(OSError):  # it has ended, and does not answer
                _send(rank, part)
        answers = []
        for number, rank in enumerate(self._ranks):
            answer = next(_received(rank), None)
            if isinstance(answer, PixelWizardError):
                raise answer
            if answer is None:
                raise GroupLost(f"rank {number} ended before it joined (exit code {rank.wait()})")
            answers.append(answer)
        return tuple(answers)

    def _last_words(self) -> Ended:
        """Return what the others tell of the end of rank 0, if they do."""
        for rank in self._ranks[1:]:
            for told in _received(rank):
                return told
        code = self._ranks[0].returncode
        text = f"rank 0 ended without a word (exit code {code}); see the worker's log"
        return Ended(text, lost=True)


def _send(rank: subprocess.Popen[bytes], message: Part | Order) -> None:
    """Tell a rank something. Raises OSError where it has ended."""
    stream = _stdin(rank)
    pickle.dump(message, stream)
    stream.flush()


def _received(rank: subprocess.Popen[bytes]) -> Iterator[Any]:
    """Return what a rank of our own tells, until it ends."""
    assert rank.stdout is not None
    with suppress(EOFError, pickle.UnpicklingError):  # killed, perhaps in the middle of a word
        while True:
            yield pickle.load(rank.stdout)


def _stdin(rank: subprocess.Popen[bytes]) -> Any:
    assert rank.stdin is not None
    return rank.stdin
