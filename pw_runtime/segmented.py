# SPDX-License-Identifier: Apache-2.0
"""A transformer that runs on engines: segments over parts of the tokens, attention between them.

The stages use it as they use a WanDiT. What is not compiled (attention over all tokens, the
adapter's backbone, a few rows of numbers) is that network's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pw_engines import DTYPES, Engine
from pw_kernels import attention
from pw_runtime.models import WanDiT
from pw_runtime.models.blocks import TextKeysValues
from pw_runtime.models.dit import Modulation
from pw_runtime.models.embeddings import Positions, patchify, rope_tables, sinusoid, unpatchify
from pw_runtime.segments import FIRST_BLOCK, POSITIONS, Segment


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a clip's tokens."""

    rows: slice
    place: Tensor  # as in `pw_kernels.qk_norm_rope`


@dataclass(frozen=True, slots=True)
class Parts:
    """All tokens of a clip, cut for the engines."""

    positions: Positions
    tokens: int
    padded: int  # rows that buffers have: a multiple of the limit where engines want it whole
    parts: tuple[Part, ...]


class SegmentedDiT:
    """The interface of WanDiT that the stages use, on engines."""

    def __init__(
        self, net: WanDiT, segments: Mapping[str, Segment], engines: Mapping[str, Engine]
    ) -> None:
        """Take the weights of `net`; `segments` and `engines` by name, all of them.

        Raises ValueError where an engine is of another segment.
        """
        self.net, self._engines = net, dict(engines)
        for name, segment in segments.items():
            if self._engines[name].spec != segment.spec:
                raise ValueError(f"the engine for {name} is of another segment")
        stored: dict[str, Tensor] = dict(net.named_parameters())
        self._weights = {
            name: [
                [stored[key.replace(FIRST_BLOCK, f"blocks.{index}.", 1)] for key in one.weights]
                for index in range(net.config.num_layers)
            ]
            for name, one in segments.items()
        }

    def text_keys_values(self, context: Tensor) -> tuple[TextKeysValues, ...]:
        """As `WanDiT.text_keys_values`."""
        context, bias = self.net.padded_text(context)
        limit = dict(self._engines["block_out"].spec.limits)["text"]
        if self._engines["block_out"].padded:
            missing = limit - len(context)
            context = torch.cat((context, context.new_zeros(missing, context.shape[1])))
            bias = torch.cat((bias, bias.new_full((missing,), float("-inf"))))
        (embedded,) = self._run("text_embed", [context])
        text = []
        for index in range(self.net.config.num_layers):
            keys, values = self._run("text_keys_values", [embedded], block=index)
            text.append(TextKeysValues(keys, values, bias))
        return tuple(text)

    def modulation(self, t: Tensor, dt: Tensor | None = None) -> Modulation:
        """As `WanDiT.modulation`, for one row: text-to-video."""
        steps = [sinusoid(x, self.net.config.freq_dim) for x in (t, dt) if x is not None]
        rows, e = self._run("modulation", steps)
        return self.net.block_rows(rows, e)

    def positions(self, latent: Tensor) -> Parts:
        """As `WanDiT.positions`, cut into parts for the engines."""
        own = self.net.positions(latent)
        tables = rope_tables(POSITIONS, self.net.config.head_dim, latent.device)
        tokens = own.grid[0] * own.grid[1] * own.grid[2]
        parts, first = [], 0
        for size in self._part_sizes("block_in", tokens):
            place = own.place + own.place.new_tensor([first, 0, 0])
            parts.append(Part(slice(first, first + size), place))
            first += size
        return Parts(Positions(own.grid, *tables, own.place), tokens, first, tuple(parts))

    def draft_features(self, draft: Tensor) -> Tensor:
        """As `WanDiT.draft_features`."""
        return self.net.draft_features(draft)

    def controls(self, features: Tensor, t: Tensor, dt: Tensor) -> dict[int, Tensor]:
        """As `WanDiT.controls`."""
        steps = [sinusoid(x, self.net.config.freq_dim) for x in (t, dt)]
        sizes = self._part_sizes("control", len(features))
        padded = _padded(features, sum(sizes))
        parts = [self._run("control", [part, *steps]) for part in padded.split(sizes)]
        whole = [torch.cat(outputs)[: len(features)] for outputs in zip(*parts, strict=True)]
        return dict(zip(self.net.config.control_blocks, whole, strict=True))

    def __call__(
        self,
        latent: Tensor,
        text: tuple[TextKeysValues, ...],
        modulation: Modulation,
        at: Parts,
        controls: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """As `WanDiT.forward`."""
        tables = (at.positions.cos, at.positions.sin)
        patches = _padded(patchify(latent), at.padded)
        x = self._over(at, "embed", [patches])[0]
        for index, keys in enumerate(text):
            rows = modulation.blocks[index]
            if controls is not None and index in controls:
                x = x.float()
                x[: at.tokens] += controls[index]
            name = "block_in" if x.dtype == torch.float32 else "block_in_first"
            q, k, v = self._over(at, name, [x], [rows, *tables], block=index, placed=True)
            # What pads the tokens stays out of the attention.
            y = attention(*(one[: at.tokens] for one in (q, k, v)))
            del q, k, v
            y = _padded(y.contiguous(), at.padded)
            x = x.float()
            self._after_attention(at, x, y, [rows, keys.keys, keys.values, keys.bias], index)
            del y
        out = self._over(at, "head", [x], [modulation.head])[0]
        return unpatchify(out[: at.tokens], at.positions.grid)

    def _after_attention(
        self, at: Parts, x: Tensor, y: Tensor, beside: list[Tensor], block: int
    ) -> None:
        """Run block_out over all parts, each in the place of what it was made from."""
        engine, weights = self._engines["block_out"], self._weights["block_out"][block]
        for part in at.parts:
            inputs = [x[part.rows], y[part.rows], *beside, *weights]
            size = part.rows.stop - part.rows.start
            (out,) = _outputs(engine, {"tokens": size}, x.device)
            engine.run(inputs, [out])
            x[part.rows] = out

    def _part_sizes(self, name: str, tokens: int) -> list[int]:
        """How many tokens an engine takes at a time: of almost one size, or whole chunks."""
        engine = self._engines[name]
        limit = dict(engine.spec.limits)["tokens"]
        count = -(-tokens // limit)
        if engine.padded:
            return [limit] * count
        return [tokens // count + (index < tokens % count) for index in range(count)]

    def _over(
        self,
        at: Parts,
        name: str,
        tokens: list[Tensor],
        beside: list[Tensor] | None = None,
        *,
        block: int = 0,
        placed: bool = False,
    ) -> list[Tensor]:
        """Run an engine over all parts: on rows of `tokens`, with the same `beside` for each."""
        engine = self._engines[name]
        outputs = _outputs(engine, {"tokens": at.padded}, tokens[0].device)
        for part in at.parts:
            inputs = [one[part.rows] for one in tokens] + (beside or [])
            inputs += [part.place] if placed else []
            engine.run(inputs + self._weights[name][block], [one[part.rows] for one in outputs])
        return outputs

    def _run(self, name: str, inputs: list[Tensor], *, block: int = 0) -> list[Tensor]:
        """Run an engine once."""
        engine = self._engines[name]
        inputs = inputs + self._weights[name][block]
        sizes = engine.spec.sizes(inputs)
        outputs = _outputs(engine, sizes, inputs[0].device)
        engine.run(inputs, outputs)
        return outputs


def _outputs(engine: Engine, sizes: Mapping[str, int], device: torch.device) -> list[Tensor]:
    """Empty tensors for an engine to fill."""
    specs = engine.spec.outputs
    return [torch.empty(s.sized(sizes), dtype=DTYPES[s.dtype], device=device) for s in specs]


def _padded(x: Tensor, rows: int) -> Tensor:
    """x with zero rows behind it, up to `rows`."""
    return x if len(x) == rows else torch.cat((x, x.new_zeros(rows - len(x), *x.shape[1:])))
