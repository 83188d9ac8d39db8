# SPDX-License-Identifier: Apache-2.0
"""Tensors that go from tile to tile of a frame where two ranks compute them.

A rank gives the next one any number of tensors in each latent frame, as its last tile makes them,
and then a word: END, or BROKEN if it has failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from pw_runtime.system.ranks import Pending, Ranks
from pw_runtime.system.tensor_messages import (
    Announced,
    receive_mark,
    receive_tensor,
    send_tensor,
)

# Instead of the number of a tensor: no more of this frame; or no more at all.
END: Final = -1
BROKEN: Final = -2


class BrokenSeam(RuntimeError):
    """The rank before this one has failed."""


@dataclass(slots=True)
class SeamLinks:
    """Connections of one rank, for what its tiles take and give; implements `Neighbours`.

    Attributes:
        ranks: this one and the others.
        own: tiles of this rank.
        before: rank to take from, or None.
        after: rank to give to, or None.
    """

    ranks: Ranks
    own: range
    before: int | None
    after: int | None
    _t: int = 0
    _open: bool = False  # the rank before this one has more
    _due: Announced | None = None  # what it sends next, for which there was no memory
    _unsent: list[Pending] = field(default_factory=list)  # of the frame before
    _sent: list[Pending] = field(default_factory=list)  # of this one

    def begin(self, t: int) -> None:
        """Begin with a latent frame."""
        self._t, self._open = t, self.before is not None

    def take(self) -> tuple[int, Tensor]:
        """Wait for the next tensor, and its number; see `Neighbours.take`.

        Raises RankFailed, ValueError for one of another frame or tile, BrokenSeam where the rank
        before this one has failed, torch.OutOfMemoryError: the next call takes the same tensor.
        """
        assert self.before is not None
        what, number = f"seam of frame {self._t}", BROKEN
        if self._open:
            self._due = self._due or receive_mark(self.ranks, self.before, what)
            x = receive_tensor(self.ranks, self._due, self.before, what)
            (t, tile, number), self._due = self._due.mark, None
            if (t, tile) != (self._t, self.own.start):
                got, wanted = f"tile {tile} of frame {t}", f"{self.own.start} of frame {self._t}"
                raise ValueError(f"rank {self.before} decodes for {got}, expected {wanted}")
            if x is not None:
                return number, x
            self._open = False
        raise BrokenSeam(f"rank {self.before} failed" if number == BROKEN else "no more rows")

    def give(self, number: int, x: Tensor) -> None:
        """Send a tensor; see `Neighbours.give`."""
        self._send(number, x)

    def end(self, word: int) -> None:
        """Finish a latent frame: take what is left, and tell the next rank that there is no more.

        The next rank has then taken all of the frame before. Raises torch.OutOfMemoryError where
        there is no memory even for what is left.
        """
        while self._open:
            try:
                self.take()
            except BrokenSeam:
                break
        self._send(word, None)
        for pending in self._unsent:
            pending.wait()
        self._unsent, self._sent = self._sent, []

    def close(self) -> None:
        """Wait until everything is sent."""
        for pending in self._unsent:
            pending.wait()

    def _send(self, number: int, x: Tensor | None) -> None:
        if self.after is not None:
            mark, what = (self._t, self.own.stop, number), f"seam of frame {self._t}"
            self._sent += send_tensor(self.ranks, x, mark, self.after, what)
