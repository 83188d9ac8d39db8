# SPDX-License-Identifier: Apache-2.0
"""A decode divided among ranks: each computes a run of tiles of every frame, rank 0 collects them.

All ranks are at the same frame. A band needs rows of the band above it, layer by layer: a rank
takes them from the rank before it as soon as they are there, and so begins a frame later than that
one by no more than its largest block, about a tenth of a frame. Before a frame rank 0 tells the
others to compute it, or to stop: whatever ends a clip, all ranks have then computed the same
frames, and no message is left.
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

from pw_runtime.errors import BadResult, BadWeights, RankFailed
from pw_runtime.execution.division import frames_begun, run_of
from pw_runtime.stages.decode_seams import BROKEN, END, SeamLinks
from pw_runtime.stages.decode_tiles import DividedTiles
from pw_runtime.system.ranks import Pending, Ranks
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
            leader.compute(t)
            if leader.far_ahead:
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
        ValueError: another rank decodes something else.
    """
    division = _Division(clip, tiles, ranks)
    if ranks.rank >= division.ranks:
        return
    own, status, unsent = division.own(ranks.rank), FINE, list[Pending]()
    seams = division.seams()
    for t in range(clip.frames):
        if not _told_to_go_on(ranks, t):
            break
        message = division.message(t, ranks.rank)
        seams.begin(t)
        if status == FINE:
            status = _compute(clip, t, own, message)
        message[0] = status
        seams.end(END if status == FINE else BROKEN)
        _wait(unsent)  # of the frame before
        unsent = [ranks.send(message, 0, f"pixels of frame {t}")]
    seams.close()
    _wait(unsent)


def _told_to_go_on(ranks: Ranks, t: int) -> bool:
    """Wait until rank 0 begins latent frame t, or stops."""
    word = torch.zeros(1, dtype=torch.int64)
    # Patiently: rank 0 may wait for its disk.
    ranks.receive(word, 0, f"word of frame {t}", patient=True).wait()
    if int(word) not in (t, STOP):
        raise ValueError(f"rank 0 decodes frame {int(word)}, rank {ranks.rank} expected {t}")
    ranks.at(f"decode, latent frame {t + 1}")
    return int(word) == t


def _compute(clip: DividedClip, t: int, own: range, message: Tensor) -> int:
    """Compute tiles into a message; return its first byte. What fails is written into it."""
    try:
        with span("chunk" if t else "first chunk"):
            pixels = clip.compute(t, own)
        torch.cat([part.flatten() for part in pixels], out=message[1:])
    except (BadWeights, BadResult):
        return NOT_FINITE
    except (RankFailed, ValueError):
        raise
    except Exception as error:
        reason = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
        text = f"{str(error) or reason}\n{traceback.format_exc()}".encode()
        text = text[: len(message) - 1].ljust(len(message) - 1, b"\0")
        message[1:] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return FAILED
    return FINE


def _failed(rank: int, message: Tensor) -> RuntimeError:
    """Return the error of another rank; its traceback is a note."""
    text = message[1:].numpy().tobytes().rstrip(b"\0").decode(errors="replace")
    reason, _, trace = text.partition("\n")
    error = RuntimeError(f"rank {rank}: {reason}")
    error.add_note(trace)
    return error


def _wait(pending: list[Pending]) -> None:
    for one in pending:
        one.wait()


@dataclass(frozen=True, slots=True)
class _Division:
    """Who computes which tiles of a clip."""

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

    def seams(self) -> SeamLinks:
        """Let the tiles of this rank take and give what they need of others."""
        rank, own, linked = self.world.rank, self.own(self.world.rank), self.tiles.linked
        before = rank - 1 if linked and rank > 0 else None
        after = rank + 1 if linked and rank + 1 < self.ranks else None
        seams = SeamLinks(self.world, own, before, after)
        self.tiles.divide(own, seams)
        return seams


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
        self._seams = self._division.seams()
        self._told = 0  # latent frames that the others were told to compute
        self._computing = False

    @property
    def far_ahead(self) -> bool:
        """Tell whether the oldest frame is to be finished before another one is begun."""
        return len(self.begun) >= frames_begun(self._division.ranks)

    @torch.inference_mode()
    def compute(self, t: int) -> None:
        """Let the others begin latent frame t, and compute its first tiles."""
        messages = [self._division.message(t, rank) for rank in self._followers]
        frame = _Frame([], messages, self._tell(t, t))
        self._told, self._computing = t + 1, True
        for rank, message in zip(self._followers, messages, strict=True):
            frame.pending.append(self._world.receive(message, rank, f"pixels of frame {t}"))
        self.begun.append(frame)
        self._seams.begin(t)
        with span("chunk" if t else "first chunk"):
            frame.own.extend(self._clip.compute(t, self._division.own(0)))
        self._computing = False
        self._seams.end(END)

    @torch.inference_mode()
    def finish(self) -> list[Tensor]:
        """Wait for the oldest frame; return the pixels of its tiles.

        Raises BadWeights, BadResult, RuntimeError for what happened on another rank.
        """
        frame, t = self.begun[0], self._told - len(self.begun)
        with span("collect"):
            _wait(frame.pending)
        self.begun.popleft()
        shapes, pixels = self._clip.shapes(t), frame.own
        for rank, message in zip(self._followers, frame.messages, strict=True):
            status = int(message[0])
            if status == NOT_FINITE:
                raise self._clip.not_finite()
            if status != FINE:
                raise _failed(rank, message)
            own = [shapes[index] for index in self._division.own(rank)]
            parts = message[1:].split([math.prod(shape) for shape in own])
            pixels += [part.view(shape) for part, shape in zip(parts, own, strict=True)]
        return pixels

    def stop(self) -> None:
        """Let the others finish the frames that they were told to compute, and no more."""
        if self._computing:
            self._seams.end(BROKEN)
        words = self._tell(self._told, STOP) if self._told < self._clip.frames else []
        self._seams.close()
        for frame in self.begun:
            _wait(frame.pending)
        _wait(words)

    def _tell(self, t: int, word: int) -> list[Pending]:
        """Send a word to all other ranks before they compute latent frame t."""
        what, message = f"word of frame {t}", torch.tensor([word])
        return [self._world.send(message, rank, what) for rank in self._followers]
