# SPDX-License-Identifier: Apache-2.0
"""State of a decode frame by frame between two latent frames, with which a later one goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from pw_runtime.models.causal_cache import CausalCache

Past = Mapping[str, Tensor]  # [1, 2, H, W, C] by part of the decode and number of the layer


class FrameLog(Protocol):
    """Finished frames of a clip and the past that its next frames need, for a later decode."""

    def begin(self) -> tuple[list[Tensor], Past] | None:
        """Return what an earlier decode or attempt has kept; None where that is nothing.

        Those are the packed pixels made of each latent frame, from the first one on, and the past
        after the last of them. They are on the host, and the caller's.
        """
        ...

    def keep(self, frames: Tensor, past: Past) -> None:
        """Keep what was made of the next latent frame, if its turn has come. Raises Stopped.

        Args:
            frames: packed pixels, which nobody changes any more.
            past: after them, on the device; the next latent frame overwrites it.
        """
        ...


def past_of(caches: Mapping[str, CausalCache], layers: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return views of the past frames in the caches of a decode's parts."""
    numbers = {layer: number for number, layer in enumerate(layers)}
    return {
        f"{part}/{numbers[layer]}": frames.movedim(1, -1)
        for part, cache in caches.items()
        for layer, frames in cache.past.items()
    }


def caches_of(past: Past, layers: Sequence[nn.Module]) -> dict[str, CausalCache]:
    """Return the caches of a decode's parts, on views of their past frames."""
    caches: dict[str, CausalCache] = {}
    for name, frames in past.items():
        part, number = name.rsplit("/", 1)
        cache = caches.setdefault(part, CausalCache(first=False))
        cache.past[layers[int(number)]] = frames.movedim(-1, 1)
    return caches
