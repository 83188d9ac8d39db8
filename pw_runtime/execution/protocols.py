# SPDX-License-Identifier: Apache-2.0
"""Interfaces of a transformer and of a decoder, as the stages use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from pw_runtime.models.blocks import TextKeysValues
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.dit import Modulation
from pw_runtime.models.embeddings import Positions
from pw_runtime.types import VaeConfig


@dataclass(frozen=True, slots=True)
class TokenSlice:
    """Consecutive tokens of a clip, for one engine call."""

    rows: slice  # of every token buffer
    origin: Tensor  # [3] int64, see `pw_kernels.qk_norm_rope`
    row: int = 0  # of the modulation, for all of them
    # Rows of the call, which takes a padded copy of these; None: it takes them where they lie.
    copied: int | None = None

    @property
    def size(self) -> int:
        """Rows of the call."""
        return self.rows.stop - self.rows.start if self.copied is None else self.copied

    def of(self, x: Tensor) -> Tensor:
        """Return what the call takes of a token buffer."""
        part = x[self.rows]
        if self.copied is None:
            return part
        taken = x.new_zeros(self.copied, *x.shape[1:])
        taken[: len(part)] = part
        return taken


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """All tokens of a clip, or those of a rank, divided into slices for the engines."""

    positions: Positions
    tokens: int
    padded: int  # rows of every token buffer: those of the tokens and of what engines pad
    slices: tuple[TokenSlice, ...]
    first: int = 0  # of the clip's tokens


@dataclass(frozen=True, slots=True)
class ControlInputs:
    """Contribution of the draft and of one step to the input of the controlled blocks."""

    features: Tensor  # [S, D], from `Transformer.control_features`
    steps: tuple[Tensor, Tensor]  # sinusoids of timestep and step size, [1, freq_dim] fp32


class Transformer(Protocol):
    """A transformer of either stage."""

    def text_keys_values(self, context: Tensor) -> tuple[TextKeysValues, ...]:
        """Compute the cross-attention keys and values of a text for every block.

        Args:
            context: [E, text_dim].
        """
        ...

    def modulation(self, t: Tensor, dt: Tensor | None = None) -> Modulation:
        """Compute the modulation rows of one step.

        Args:
            t: [R] timestep; R is 1, or 2 where the layout has clean frames: theirs is the first.
            dt: [R] step size, for the high-res network.
        """
        ...

    def layout(self, latent: Tensor, clean: int = 0) -> TokenLayout:
        """Divide the tokens of a latent for the engines.

        Args:
            latent: [C, T, H, W].
            clean: latent frames at the beginning that are known: no call takes tokens of these
                and of others.

        Raises:
            ValueError: clean frames for engines that take all tokens at once.
        """
        ...

    def control_features(self, draft: Tensor) -> Tensor:
        """Compute what the adapter sees in the resized draft, [C, T, H/2, W/2] -> [S, D]."""
        ...

    def control_inputs(self, features: Tensor, t: Tensor, dt: Tensor) -> ControlInputs:
        """Collect the control of one step; it is computed where it is added, slice by slice.

        Args:
            features: from `control_features`.
            t: [1] timestep.
            dt: [1] step size.
        """
        ...

    def velocities(
        self,
        latent: Tensor,
        texts: Sequence[tuple[TextKeysValues, ...]],
        modulation: Modulation,
        layout: TokenLayout,
        control: ControlInputs | None = None,
        on_block: Callable[[], None] = lambda: None,
    ) -> list[Tensor]:
        """Compute one velocity per text.

        Args:
            latent: [C, T, H, W] fp32, H and W even.
            texts: from `text_keys_values`.
            modulation: from `modulation`.
            layout: from `layout`, of a latent of this shape.
            control: from `control_inputs`, for the high-res network and for no other.
            on_block: called after each block of each pass.

        Returns:
            [C, T, H, W] fp32 for each text.

        Raises:
            ValueError: control is missing, or given to a network that takes none.
        """
        ...

    def check_weights(self) -> None:
        """Raise BadWeights naming the weights that hold NaN or infinity."""
        ...

    def close(self) -> None:
        """Release what provides the weights; nothing can run afterwards."""
        ...


class _Decoder(Protocol):
    """The two parts of a VAE decoder, one latent frame at a time."""

    @property
    def config(self) -> VaeConfig:
        """The widths of the VAE."""
        ...

    def coarse(self, frame: Tensor, cache: CausalCache) -> Tensor:
        """Run everything up to the first upsampling, for one latent frame, [C, 1, H, W]."""
        ...

    def fine(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the rest, for some columns; see `pw_runtime.models.VaeDecoder.fine`."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Yield its layers, always in the same order: past frames and rows are kept by layer."""
        ...

    def check_weights(self) -> None:
        """Raise BadWeights naming the weights that hold NaN or infinity."""
        ...


class BandDecoder(_Decoder, Protocol):
    """A decoder whose exact decode is divided into bands of rows; see `VaeDecoder`."""

    exact_tiling: Literal["bands"]

    def global_part(self, frame: Tensor, cache: CausalCache) -> Tensor:
        """Run what must see the whole of a latent frame, [C, 1, H, W] -> [1, C', 1, H, W]."""
        ...

    def local_part(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the rest, for a band of its rows."""
        ...


class StripDecoder(_Decoder, Protocol):
    """A decoder whose exact decode is divided into strips of columns that overlap."""

    exact_tiling: Literal["halo"]


Decoder = BandDecoder | StripDecoder
