# SPDX-License-Identifier: Apache-2.0
"""State that the VAE carries along: frames from chunk to chunk, rows from band to band.

A frame passes through the decoder's fine part in bands of rows, top to bottom. A 3x3 convolution
cannot compute the last row of a band before it has the first row of the next one. It skips that
row and keeps its last two input rows for the next band, whose output then starts one row higher.
Nothing is computed twice and nothing is missing: the bands together equal the undivided frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Add = Callable[[Tensor, Tensor], object]


@dataclass(slots=True)
class Seam:
    """Rows of one chunk that the band above kept, by the module that needs them."""

    rows: dict[nn.Module, Tensor] = field(default_factory=dict)
    bottom: bool = False  # the current band is the last one and keeps nothing

    def keep(self, owner: nn.Module, x: Tensor, rows: int) -> None:
        """Keep the last `rows` rows of x, [..., H, W], for the band below, if there is one."""
        if self.bottom:
            self.rows.pop(owner, None)
        else:
            self.rows[owner] = x[..., x.shape[-2] - rows :, :].clone()

    def join(self, owner: nn.Module, x: Tensor) -> tuple[Tensor, int, int]:
        """Put the rows kept from the band above on top of x, for a 3-row convolution.

        Args:
            owner: the module that convolves.
            x: [..., H, W].

        Returns:
            [..., H', W], and how many of its rows at the top and at the bottom are only neighbours
            of rows to compute.
        """
        above = self.rows.get(owner)
        joined = x if above is None else torch.cat((above, x), dim=-2)
        self.keep(owner, joined, 2)
        return joined, 0 if above is None else 1, 0 if self.bottom else 1

    def add(self, owner: nn.Module, h: Tensor, x: Tensor, add: Add, grow: int = 1) -> None:
        """Add a shortcut x to h, which lags behind it: first the rows kept from above, then x.

        Args:
            owner: the module that the shortcut bypasses.
            h: [1, C', T', H', W'], overwritten.
            x: [1, C, T, H, W].
            add: adds rows of x to the corresponding rows of h, in place.
            grow: rows of h per row of x.
        """
        done, kept = 0, []
        above = self.rows.pop(owner, None)
        for rows in (x,) if above is None else (above, x):
            count = min(rows.shape[3], h.shape[3] // grow - done)
            if count:
                add(h[:, :, :, done * grow : (done + count) * grow], rows[:, :, :, :count])
            if count < rows.shape[3]:
                kept.append(rows[:, :, :, count:])
            done += count
        if kept:
            self.rows[owner] = torch.cat(kept, dim=3)


@dataclass(slots=True)
class CausalCache:
    """Past input frames of every causal convolution, updated by each chunk.

    Attributes:
        past: [1, C, 2, H, W] by convolution.
        first: no chunk has passed yet.
        on_host: keep the frames in host memory, pinned if the decoder is on a GPU; they are copied
            into the buffer that a convolution reads, and back.
        seam: rows of a chunk that is decoded in bands; None if it is not divided.
    """

    past: dict[nn.Module, Tensor] = field(default_factory=dict)
    first: bool = True
    on_host: bool = False
    seam: Seam | None = None

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        """Copy frames, [1, C, 2, H, W], into the cache's own memory."""
        past = self.past.get(conv)
        if past is not None:
            past.copy_(frames, non_blocking=True)
        elif self.on_host and frames.device.type != "cpu":
            past = torch.empty_like(frames, device="cpu", pin_memory=frames.is_cuda)
            self.past[conv] = past.copy_(frames, non_blocking=True)
        else:
            self.past[conv] = frames.clone()
