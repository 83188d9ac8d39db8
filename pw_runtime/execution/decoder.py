# SPDX-License-Identifier: Apache-2.0
"""A VAE decoder on engines, which the decode stage uses like the VaeDecoder itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from pw_engines import DTYPES, Engine
from pw_runtime.execution.decoder_segments import (
    LAST,
    PAST,
    Part,
    as_rows,
    from_engine,
    segment_name,
    stored_weights,
    to_engine,
)
from pw_runtime.execution.transformer_segments import Segment
from pw_runtime.models import VaeDecoder
from pw_runtime.models.causal_cache import CausalCache
from pw_runtime.models.finite import require_finite_weights


class SegmentedVae:
    """A VaeDecoder on engines; implements `protocols.StripDecoder`.

    It fills a cache exactly as the eager decoder does: either can continue a clip of the other.
    """

    exact_tiling: Literal["halo"] = "halo"

    def __init__(
        self, net: VaeDecoder, segments: Mapping[str, Segment], engines: Mapping[str, Engine]
    ) -> None:
        """Run with the weights of `net`; `segments` of any sizes, and their engines, by name.

        Raises ValueError where an engine was made for another segment.
        """
        self.config, self._net = net.config, net
        self._engines: dict[tuple[str, tuple[int | str, ...]], tuple[Engine, list[Tensor]]] = {}
        stored = {name: as_rows(name, x) for name, x in stored_weights(net).items()}
        for name, segment in segments.items():
            engine = engines[name]
            if engine.spec != segment.spec:
                raise ValueError(f"the engine for {name} was made for another segment")
            key = (segment.name, engine.spec.inputs[0].shape)
            self._engines[key] = (engine, [stored[name] for name in segment.weights])

    def coarse(self, frame: Tensor, cache: CausalCache) -> Tensor:
        """Run the coarse part of one frame. Raises ValueError for a size without an engine."""
        return self._run("coarse", self._net.denormalised(frame), cache)

    def fine(self, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the fine part of some columns. Raises ValueError for a size without an engine."""
        frames = self._run("fine", x, cache).split(1, dim=2)
        return torch.cat([self._run("frame", frame, cache)[0] for frame in frames], dim=1)

    def modules(self) -> Iterator[nn.Module]:
        """Yield the layers of the eager decoder; see `protocols.Decoder`."""
        return self._net.modules()

    def check_weights(self) -> None:
        """Raise BadWeights for weights that are not finite; see `protocols.Decoder`."""
        require_finite_weights(self._net)

    def _run(self, part: Part, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the engine of this part for x and store its past frames in the cache."""
        name, x = segment_name(part, first=cache.first), to_engine(x).contiguous()
        entry = self._engines.get((name, tuple(x.shape)))
        if entry is None:
            sizes = [shape for segment, shape in self._engines if segment == name]
            raise ValueError(f"{name}: expected x of shape {sizes}, got {tuple(x.shape)}")
        engine, weights = entry
        spec, past = engine.spec, cache.past
        inputs = [x]
        for tensor in spec.inputs[1 : len(spec.inputs) - len(weights)]:
            frames = past.get(self._net.get_submodule(tensor.name.removesuffix(PAST)))
            # None before a clip, and at its second latent frame where frames are doubled.
            inputs.append(x.new_zeros(tensor.sized({})) if frames is None else to_engine(frames))
        outputs = [
            torch.empty(tensor.sized({}), dtype=DTYPES[tensor.dtype], device=x.device)
            for tensor in spec.outputs
        ]
        engine.run(inputs + weights, outputs)
        for tensor, frames in zip(spec.outputs[1:], outputs[1:], strict=True):
            past[self._net.get_submodule(tensor.name.removesuffix(LAST))] = from_engine(frames)
        cache.first = False
        return from_engine(outputs[0])
