# SPDX-License-Identifier: Apache-2.0
"""A VAE decoder that runs on engines: the decode stage uses it as it uses a VaeDecoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

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


class SegmentedVae:
    """The interface of VaeDecoder that the decode stage uses, on engines.

    A cache holds what the decoder itself would have put into it: a clip that one of them began,
    the other can go on with.
    """

    def __init__(
        self, net: VaeDecoder, segments: Mapping[str, Segment], engines: Mapping[str, Engine]
    ) -> None:
        """Take the weights of `net`; `segments` of any sizes, and their engines, by name.

        Raises ValueError where an engine is of another segment.
        """
        self.config, self._net = net.config, net
        self._engines: dict[tuple[str, tuple[int | str, ...]], tuple[Engine, list[Tensor]]] = {}
        stored = {name: as_rows(name, x) for name, x in stored_weights(net).items()}
        for name, segment in segments.items():
            engine = engines[name]
            if engine.spec != segment.spec:
                raise ValueError(f"the engine for {name} is of another segment")
            key = (segment.name, engine.spec.inputs[0].shape)
            self._engines[key] = (engine, [stored[name] for name in segment.weights])

    def coarse(self, frame: Tensor, cache: CausalCache) -> Tensor:
        """As `VaeDecoder.coarse`. Raises ValueError for a size that no engine is of."""
        return self._run("coarse", self._net.denormalised(frame), cache)

    def fine(self, x: Tensor, cache: CausalCache) -> Tensor:
        """As `VaeDecoder.fine`. Raises ValueError for a size that no engine is of."""
        return self._run("fine", x, cache)[0]

    def _run(self, part: Part, x: Tensor, cache: CausalCache) -> Tensor:
        """Run the engine of this part for x; the cache then holds what it remembers."""
        name, x = segment_name(part, first=cache.first), to_engine(x).contiguous()
        found = self._engines.get((name, tuple(x.shape)))
        if found is None:
            sizes = [shape for segment, shape in self._engines if segment == name]
            raise ValueError(f"{name}: wanted x of shape {sizes}, got {tuple(x.shape)}")
        engine, weights = found
        spec, past = engine.spec, cache.past
        inputs = [x]
        for one in spec.inputs[1 : len(spec.inputs) - len(weights)]:
            held = past.get(self._net.get_submodule(one.name.removesuffix(PAST)))
            # What doubles frames has no past at the second latent frame.
            inputs.append(x.new_zeros(one.sized({})) if held is None else to_engine(held))
        outputs = [
            torch.empty(one.sized({}), dtype=DTYPES[one.dtype], device=x.device)
            for one in spec.outputs
        ]
        engine.run(inputs + weights, outputs)
        for one, frames in zip(spec.outputs[1:], outputs[1:], strict=True):
            past[self._net.get_submodule(one.name.removesuffix(LAST))] = from_engine(frames)
        cache.first = False
        return from_engine(outputs[0])
