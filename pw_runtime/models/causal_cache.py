# SPDX-License-Identifier: Apache-2.0
"""What the VAE remembers: frames from chunk to chunk, rows from band to band.

A picture passes through the decoder's fine part in bands of rows, from the top. A 3x3 convolution
cannot make the last row of a band before it has seen the first of the next one. It does not make
it: it keeps its last two rows for the next band, whose result then begins one row higher. Nothing
is computed twice and nothing is left out, so that the bands put together are what the whole
picture would have given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Add = Callable[[Tensor, Tensor], object]


@dataclass(slots=True)
class Seam:
    """Rows that the band above has left, by the module that needs them; of one chunk of frames."""

    rows: dict[nn.Module, Tensor] = field(default_factory=dict)
    bottom: bool = False  # the band that passes is the last one: nothing is left to wait for

    def leave(self, owner: nn.Module, x: Tensor, rows: int) -> None:
        """Keep the last rows of x, [..., H, W], for the band below, if there is one."""
        if self.bottom:
            self.rows.pop(owner, None)
        else:
            self.rows[owner] = x[..., x.shape[-2] - rows :, :].clone()

    def join(self, owner: nn.Module, x: Tensor) -> tuple[Tensor, int, int]:
        """[..., H, W] -> rows of the band above and x; how many at its top and bottom are extra.

        For what looks one row up and down: the rows that stand there for their neighbours only.
        """
        above = self.rows.get(owner)
        joined = x if above is None else torch.cat((above, x), dim=-2)
        self.leave(owner, joined, 2)
        return joined, 0 if above is None else 1, 0 if self.bottom else 1

    def add(self, owner: nn.Module, h: Tensor, x: Tensor, add: Add, grow: int = 1) -> None:
        """Add x to h, which lags behind it: first what the band above has left, then x.

        Args:
            owner: the module whose shortcut x is.
            h: [1, C', T', H', W'], overwritten.
            x: [1, C, T, H, W].
            add: adds rows of x to as many rows of h, in place.
            grow: rows of h that one row of x becomes.
        """
        done, left = 0, []
        above = self.rows.pop(owner, None)
        for part in (x,) if above is None else (above, x):
            count = min(part.shape[3], h.shape[3] // grow - done)
            if count:
                add(h[:, :, :, done * grow : (done + count) * grow], part[:, :, :, :count])
            if count < part.shape[3]:
                left.append(part[:, :, :, count:])
            done += count
        if left:
            self.rows[owner] = torch.cat(left, dim=3)


@dataclass(slots=True)
class CausalCache:
    """Past input frames of every causal convolution, filled as chunks go through.

    Attributes:
        past: [1, C, 2, H, W] by convolution.
        first: no chunk has gone through yet.
        on_host: the frames lie in host memory, pinned where the decoder is on a GPU. They are
            copied from there to where a convolution reads them, and back.
        seam: of the chunk that goes through in bands; None where it goes as a whole.
    """

    past: dict[nn.Module, Tensor] = field(default_factory=dict)
    first: bool = True
    on_host: bool = False
    seam: Seam | None = None

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        """Remember frames, [1, C, 2, H, W], in memory of their own."""
        held = self.past.get(conv)
        if held is not None:
            held.copy_(frames, non_blocking=True)
        elif self.on_host and frames.device.type != "cpu":
            held = torch.empty_like(frames, device="cpu", pin_memory=frames.is_cuda)
            self.past[conv] = held.copy_(frames, non_blocking=True)
        else:
            self.past[conv] = frames.clone()
