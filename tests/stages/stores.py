# SPDX-License-Identifier: Apache-2.0
"""Stores of tiles and logs of frames for tests of the decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from pw_runtime.stages.decode import decode_frames
from pw_runtime.types import Compat, FrameChunk, Latent, PixelFormat, TilingConfig

LATENT_FRAMES = 4  # of the clips of `check_goes_on`


class Nowhere:
    """Keeps nothing."""

    finished = 0

    def open(self, shapes: Sequence[tuple[int, ...]], frames: int) -> None:
        self.shapes = shapes

    def write(self, pixels: torch.Tensor) -> None:
        pass

    def finish(self) -> None:
        pass

    def read(self, tile: int, start: int, count: int) -> torch.Tensor:
        return torch.empty((count, *self.shapes[tile]), dtype=torch.uint8)


class Cut(Exception):
    """What ends a decode in these tests."""


class InMemory:
    """A log of frames that ends the decode after so many latent frames."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.frames: list[Tensor] = []
        self.past: dict[str, Tensor] = {}

    def begin(self) -> tuple[list[Tensor], Mapping[str, Tensor]] | None:
        # As from a file: dense, in the order of the dimensions that is seen.
        past = {
            name: x.clone(memory_format=torch.contiguous_format) for name, x in self.past.items()
        }
        return (list(self.frames), past) if self.frames else None

    def keep(self, frames: Tensor, past: Mapping[str, Tensor]) -> None:
        self.frames.append(frames)
        self.past = {name: x.clone() for name, x in past.items()}
        if len(self.frames) == self.end:
            raise Cut


def check_goes_on(
    net: object, z: Latent, tiling: TilingConfig, pixels: PixelFormat = "yuv420p"
) -> None:
    """Compare a decode that is cut after one, two, three latent frames with a whole one."""
    whole = list(decode_frames(net, z, tiling, Compat(), pixels))
    log = InMemory(end=1)
    for log.end in range(1, LATENT_FRAMES):
        got: list[FrameChunk] = []
        with pytest.raises(Cut):
            got.extend(decode_frames(net, z, tiling, Compat(), pixels, log=log))
        assert len(log.frames) == log.end
    made, taken = list[float](), list[float]()
    told = {"advance": made.append, "skip": taken.append}
    chunks = list(decode_frames(net, z, tiling, Compat(), pixels, log=log, **told))
    assert sum(taken) == 4 * (LATENT_FRAMES - 1) - 3
    assert sum(made) == pytest.approx(4)
    assert [chunk.start for chunk in chunks] == [chunk.start for chunk in whole]
    for ours, theirs in zip(chunks, whole, strict=True):
        assert torch.equal(ours.frames, theirs.frames)
