# SPDX-License-Identifier: Apache-2.0
"""A decode divided among ranks: each computes some tiles of every latent frame, rank 0 collects.

The ranks pass a frame on like a wave. Rank r computes its tiles of frame t after rank r - 1, whose
last tile hands on what the next one needs; meanwhile rank r - 1 computes frame t + 1. So rank 0 is
ahead of the last one by as many frames as there are other ranks, and never by more. Before a frame
rank 0 tells the others to compute it, or to stop: all of them then have computed the same frames,
and no message is left, whatever ended the clip.
"""

from __future__ import annotations

import math
import traceback
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from pw_runtime.errors import BadResult, BadWeights
from pw_runtime.execution.division import run_of
from pw_runtime.stages.decode_tiles import DividedTiles
from pw_runtime.system.ranks import Pending, Ranks
from pw_runtime.system.tensor_parcel import Parcel, receive_parcel
from pw_runtime.system.trace import span

STOP: Final = -1  # instead of the number of the frame to compute
# First byte of a message with pixels. Other than FINE, they are no pixels, and there are no more.
FINE, NOT_FINITE, FAILED = 0, 1, 2


class DividedClip(Protocol):
    """A clip's decode, as one rank sees it."""

    @property
    def frames(self) -> int:
        """Latent frames."""
        ...

    def compute(self, t: int, own: range) -> list[Tensor]:
        """Return the packed pixels of some tiles of latent frame t, frames in order.

        Raises BadWeights, BadResult for NaN.
        """
        ...

    def shapes(self, t: int) -> list[tuple[int, ...]]:
        """Return the shape of each tile's packed pixels in latent frame t."""
        ...

    def not_finite(self) -> BadResult:
        """Return the error for NaN in frames. Raises BadWeights where it is in the weights."""
        ...


def lead(
    clip: DividedClip, tiles: DividedTiles, ranks: Ranks
) -> Generator[list[Tensor], None, None]:
    """Compute the first tiles of every latent frame, on rank 0, and collect the others.

    The other ranks call `follow`. Where this ends early, also because it is closed, they return.

    Yields:
        The packed pixels of all tiles of a latent frame.

    Raises:
        BadWeights, BadResult: a rank got NaN or infinity.
        RuntimeError: another rank failed, by its message; it is ready for another clip.
        RankFailed: another rank died.
    """
    leader = _Leader(clip, tiles, ranks)
    try:
        for t in range(clip.frames):
            leader.begin(t)
            if leader.ahead:
                yield leader.finish()
        while leader.begun:
            yield leader.finish()
    except (Exception, GeneratorExit):
        leader.stop()
        raise


@torch.inference_mode()
def follow(clip: DividedClip, tiles: DividedTiles, ranks: Ranks) -> None:
    """Compute this rank's tiles of every latent frame, until rank 0 tells it to stop.

    What fails here is told to rank 0, which then stops all ranks.

    Raises:
        RankFailed: another rank died.
        ValueError: another rank is at another frame.
    """
    division = _Division(clip, tiles, ranks)
    if ranks.rank >= division.ranks:
        return
    own, status, unsent = division.own(ranks.rank), FINE, list[Pending]()
    for t in range(clip.frames):
        if not _told_to_go_on(ranks, t):
            break
        given = division.take(t)
        message = division.message(t, ranks.rank)
        if status == FINE:
            tiles.take_over(t, given)
            del given
            status = _compute(clip, t, own, message)
        message[0] = status
        parcel = division.parcel(t, failed=status != FINE)
        for pending in unsent:  # of the frame before
            pending.wait()
        unsent = division.hand(t, parcel)
        unsent.append(ranks.send(message, 0, f"pixels of frame {t}"))
        del parcel, message
    for pending in unsent:
        pending.wait()


def _told_to_go_on(ranks: Ranks, t: int) -> bool:
    """Wait until rank 0 has computed its tiles of latent frame t, or stops."""
    word = torch.zeros(1, dtype=torch.int64)
    ranks.receive(word, 0, f"word of frame {t}").wait()
    if int(word) not in (t, STOP):
        raise ValueError(f"rank 0 decodes frame {int(word)}, rank {ranks.rank} expected {t}")
    return int(word) == t


def _compute(clip: DividedClip, t: int, own: range, message: Tensor) -> int:
    """Compute tiles into a message; return its first byte. What fails is written into it."""
    try:
        with span("chunk" if t else "first chunk"):
            pixels = clip.compute(t, own)
        torch.cat([part.flatten() for part in pixels], out=message[1:])
    except (BadWeights, BadResult):
        return NOT_FINITE
    except Exception as error:
        reason = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
        text = f"{str(error) or reason}\n{traceback.format_exc()}".encode()
        text = text[: len(message) - 1].ljust(len(message) - 1, b"\0")
        message[1:] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return FAILED
    return FINE


@dataclass(frozen=True, slots=True)
class _Division:
    """Who computes which tiles of a clip, and what goes from rank to rank."""

    clip: DividedClip
    tiles: DividedTiles
    world: Ranks

    @property
    def ranks(self) -> int:
        """Ranks that compute: no more than there are tiles."""
        return min(self.world.size, len(self.tiles.rects))

    def own(self, rank: int) -> range:
        """Return the tiles of a rank."""
        return run_of(len(self.tiles.rects), self.ranks, rank)

    def message(self, t: int, rank: int) -> Tensor:
        """Return memory for the pixels of a rank in latent frame t: a byte, then all of them."""
        shapes = self.clip.shapes(t)
        return torch.empty(1 + sum(math.prod(shapes[i]) for i in self.own(rank)), dtype=torch.uint8)

    def parcel(self, t: int, *, failed: bool = False) -> Parcel | None:
        """Pack what the next rank needs for latent frame t; nothing if this one has failed."""
        tiles, world = self.tiles, self.world
        if not tiles.handed or world.rank + 1 == self.ranks:
            return None
        tensors = {} if failed else tiles.hand_on(t)
        mark = (t, self.own(world.rank).stop)
        return Parcel.of(tensors, tiles.handed, mark, world.device)

    def hand(self, t: int, parcel: Parcel | None) -> list[Pending]:
        """Send it."""
        if parcel is None:
            return []
        return parcel.send(self.world, self.world.rank + 1, f"seam of frame {t}")

    def take(self, t: int) -> dict[int, Tensor]:
        """Receive it from the rank before this one."""
        if not self.tiles.handed:
            return {}
        before, mark = self.world.rank - 1, (t, self.own(self.world.rank).start)
        return receive_parcel(self.world, before, self.tiles.handed, mark, f"seam of frame {t}")


@dataclass(frozen=True, slots=True)
class _Frame:
    """A latent frame that not all ranks have finished."""

    own: list[Tensor]  # packed pixels of the tiles of rank 0
    messages: list[Tensor]  # of the other ranks
    pending: list[Pending]  # their messages, and the words to them


class _Leader:
    """Rank 0 of a divided decode.

    Attributes:
        begun: latent frames that not all ranks have finished, in order.
    """

    def __init__(self, clip: DividedClip, tiles: DividedTiles, ranks: Ranks) -> None:
        self.begun: deque[_Frame] = deque()
        self._clip, self._world = clip, ranks
        self._division = _Division(clip, tiles, ranks)
        self._followers = range(1, self._division.ranks)
        self._told = 0  # latent frames that the others were told to compute
        self._handed: list[Pending] = []  # what the next rank needs for the last one of them

    @property
    def ahead(self) -> bool:
        """Whether the oldest frame is to be finished before another one is begun."""
        return len(self.begun) == self._division.ranks

    @torch.inference_mode()
    def begin(self, t: int) -> None:
        """Compute the first tiles of latent frame t and let the others go on with it."""
        division = self._division
        with span("chunk" if t else "first chunk"):
            own = self._clip.compute(t, division.own(0))
        parcel = division.parcel(t)
        messages = [division.message(t, rank) for rank in self._followers]
        for pending in self._handed:
            pending.wait()
        self._told = t + 1
        frame = _Frame(own, messages, self._tell(t, t))
        self._handed = division.hand(t, parcel)
        for rank, message in zip(self._followers, messages, strict=True):
            frame.pending.append(self._world.receive(message, rank, f"pixels of frame {t}"))
        self.begun.append(frame)

    @torch.inference_mode()
    def finish(self) -> list[Tensor]:
        """Wait for the oldest frame; return the pixels of its tiles.

        Raises BadWeights, BadResult, RuntimeError for what happened on another rank.
        """
        frame, t = self.begun[0], self._told - len(self.begun)
        with span("collect"):
            for pending in frame.pending:
                pending.wait()
        self.begun.popleft()
        shapes, pixels = self._clip.shapes(t), frame.own
        for rank, message in zip(self._followers, frame.messages, strict=True):
            status = int(message[0])
            if status == NOT_FINITE:
                raise self._clip.not_finite()
            if status != FINE:
                text = message[1:].numpy().tobytes().rstrip(b"\0").decode(errors="replace")
                raise RuntimeError(f"rank {rank}: {text}")
            own = [shapes[index] for index in self._division.own(rank)]
            parts = message[1:].split([math.prod(shape) for shape in own])
            pixels += [part.view(shape) for part, shape in zip(parts, own, strict=True)]
        return pixels

    def stop(self) -> None:
        """Let the others finish the frames that they were told to compute, and no more."""
        pending = [*self._handed]
        if self._told < self._clip.frames:
            pending += self._tell(self._told, STOP)
        for frame in self.begun:
            pending += frame.pending
        for one in pending:
            one.wait()

    def _tell(self, t: int, word: int) -> list[Pending]:
        """Send a word to all other ranks before they compute latent frame t."""
        what, message = f"word of frame {t}", torch.tensor([word])
        return [self._world.send(message, rank, what) for rank in self._followers]
