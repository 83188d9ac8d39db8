# SPDX-License-Identifier: Apache-2.0
"""State that the VAE carries along: frames from chunk to chunk, rows from band to band.

A frame passes through the decoder's convolutional part in bands of rows, top to bottom. A 3x3
convolution cannot compute the last row of a band before it has the first row of the next one. It
skips that row and keeps its last two input rows for the next band, whose output then starts one row
higher. Nothing is computed twice and nothing is missing: the bands together equal the undivided
frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Add = Callable[[Tensor, Tensor], object]
Allocate = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Seam:
    """Rows of one chunk that the band above kept, by the module that needs them.

    Attributes:
        rows: what was kept; a band replaces what it was given by what the next one needs.
        top: the current band is the first one: nothing is above it.
        bottom: the current band is the last one, and keeps nothing.
        allocate: returns memory for rows of this shape and dtype, beside them or on the host.
        take: waits for the next rows of a band above that is computed elsewhere, in the order in
            which it keeps them; returns the module that needs them, and the rows.
        give: passes on rows at once that a band below needs which is computed elsewhere.
    """

    rows: dict[nn.Module, Tensor] = field(default_factory=dict)
    top: bool = True
    bottom: bool = False
    allocate: Allocate = torch.empty_like
    take: Callable[[], tuple[nn.Module, Tensor]] | None = None
    give: Callable[[nn.Module, Tensor], object] | None = None

    def above(self, owner: nn.Module, x: Tensor, rows: int) -> Tensor | None:
        """Return the `rows` rows above x that the band above kept; None at the top.

        They are zeros where the band above was not computed: what then depends on them is wrong,
        and up to the caller to drop.

        Args:
            owner: the module that needs them.
            x: [..., H, W] on the decoder's device.
            rows: how many.
        """
        if self.top:
            return None
        while self.take is not None and owner not in self.rows:
            needed_by, taken = self.take()
            self.rows[needed_by] = taken
        kept = self.rows.get(owner)
        if kept is not None:
            return kept.to(x.device, non_blocking=True)
        order = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
        shape = (*x.shape[:-2], rows, x.shape[-1])
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order).zero_()

    def keep(self, owner: nn.Module, x: Tensor) -> None:
        """Copy rows, [..., rows, W], for the band below, if there is one."""
        if self.bottom:
            self.rows.pop(owner, None)
            return
        if owner not in self.rows:
            self.rows[owner] = self.allocate(x)
        kept = self.rows[owner]
        if x.device != kept.device and x.stride() != kept.stride():
            # Dense: with gaps, PyTorch would copy by way of memory that is not pinned.
            x = x.clone()
        kept.copy_(x, non_blocking=True)
        if self.give is not None:
            self.give(owner, self.rows.pop(owner))

    def join(self, owner: nn.Module, x: Tensor) -> tuple[Tensor, int, int]:
        """Put the rows kept from the band above on top of x, for a 3-row convolution.

        Args:
            owner: the module that convolves.
            x: [..., H, W].

        Returns:
            [..., H', W], and how many of its rows at the top and at the bottom are only neighbours
            of rows to compute.
        """
        above = self.above(owner, x, 2)
        joined = x if above is None else torch.cat((above, x), dim=-2)
        self.keep(owner, joined[..., joined.shape[-2] - 2 :, :])
        return joined, int(not self.top), int(not self.bottom)

    def add(
        self, owner: nn.Module, h: Tensor, x: Tensor, add: Add, *, lag: int, grow: int = 1
    ) -> None:
        """Add a shortcut x to h, which lags behind it: first the rows kept from above, then x.

        Args:
            owner: the module that the shortcut bypasses.
            h: [1, C', T', H', W'], overwritten.
            x: [1, C, T, H, W].
            add: adds rows of x to the corresponding rows of h, in place.
            lag: rows of x by which h lags behind, other than at the bottom.
            grow: rows of h per row of x.
        """
        above = self.above(owner, x, lag)
        done, left = 0, []
        for rows in (x,) if above is None else (above, x):
            count = min(rows.shape[3], h.shape[3] // grow - done)
            if count:
                add(h[:, :, :, done * grow : (done + count) * grow], rows[:, :, :, :count])
            if count < rows.shape[3]:
                left.append(rows[:, :, :, count:])
            done += count
        self.keep(owner, torch.cat(left, dim=3) if left else x)  # at the bottom nothing is left


@dataclass(slots=True)
class CausalCache:
    """Past input frames of every causal convolution, updated by each chunk.

    Attributes:
        past: [1, C, 2, H, W] by convolution; in a band, with the rows above it that it sees.
        first: no chunk has passed yet.
        seam: rows of a chunk that is decoded in bands; None if it is not divided.
    """

    past: dict[nn.Module, Tensor] = field(default_factory=dict)
    first: bool = True
    seam: Seam | None = None

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        """Copy frames, [1, C, 2, H, W], into the cache's own memory."""
        past = self.past.get(conv)
        if past is None:
            self.past[conv] = frames.clone()
        else:
            past.copy_(frames)
