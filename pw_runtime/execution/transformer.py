# SPDX-License-Identifier: Apache-2.0
"""A transformer that runs on engines: segments over parts of the tokens, attention between them.

The stages use it as they use a WanDiT. What is not compiled (attention over all tokens, the
adapter's backbone, a few rows of numbers) is that network's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pw_engines import DTYPES, Engine
from pw_kernels import attention
from pw_runtime.execution.transformer_segments import POSITIONS, Segment
from pw_runtime.execution.weight_streaming import ResidentWeights, Weights
from pw_runtime.models import WanDiT
from pw_runtime.models.blocks import TextKeysValues
from pw_runtime.models.dit import Modulation
from pw_runtime.models.embeddings import Positions, patchify, rope_tables, sinusoid, unpatchify

# That the result of attention may take beside queries, keys and values: it is made some heads at a
# time where all together would be larger.
ATTENTION_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class TokenSlice:
    """Some of a clip's tokens."""

    rows: slice
    place: Tensor  # as in `pw_kernels.qk_norm_rope`


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """All tokens of a clip, cut for the engines."""

    positions: Positions
    tokens: int
    padded: int  # rows that buffers have: a multiple of the limit where engines want it whole
    parts: tuple[TokenSlice, ...]


@dataclass(frozen=True, slots=True)
class ControlInputs:
    """What the draft and one step add to the input of the controlled blocks."""

    features: Tensor  # [S, D] of `draft_features`
    steps: tuple[Tensor, Tensor]  # sinusoids of timestep and step size, [1, freq_dim] fp32


class SegmentedDiT:
    """The interface of WanDiT that the stages use, on engines."""

    def __init__(
        self,
        net: WanDiT,
        segments: Mapping[str, Segment],
        engines: Mapping[str, Engine],
        weights: Weights | None = None,
        *,
        share: bool = True,
        part: int | None = None,
    ) -> None:
        """Run `net` on engines.

        Args:
            net: the network.
            segments: of it, by name.
            engines: for all segments.
            weights: where they are; None: on the device.
            share: whether passes of one step share the first block's self-attention, which holds
                its result during the first pass. Both ways give the same bits.
            part: most tokens to work on at a time, where that is less than the engines take.

        Raises:
            ValueError: an engine is of another segment.
        """
        self.net, self._engines = net, dict(engines)
        for name, segment in segments.items():
            if self._engines[name].spec != segment.spec:
                raise ValueError(f"the engine for {name} is of another segment")
        self._weights = weights or ResidentWeights(net, segments)
        self._share, self._part = share, part

    def close(self) -> None:
        """Let go what brings the weights; nothing can be run any more."""
        self._weights.close()

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

    def positions(self, latent: Tensor) -> TokenLayout:
        """As `WanDiT.positions`, cut into parts for the engines."""
        own = self.net.positions(latent)
        tables = rope_tables(POSITIONS, self.net.config.head_dim, latent.device)
        tokens = own.grid[0] * own.grid[1] * own.grid[2]
        parts, first = [], 0
        for size in self._part_sizes("block_in", tokens):
            place = own.place + own.place.new_tensor([first, 0, 0])
            parts.append(TokenSlice(slice(first, first + size), place))
            first += size
        return TokenLayout(Positions(own.grid, *tables, own.place), tokens, first, tuple(parts))

    def draft_features(self, draft: Tensor) -> Tensor:
        """As `WanDiT.draft_features`."""
        return self.net.draft_features(draft)

    def steering(self, features: Tensor, t: Tensor, dt: Tensor) -> ControlInputs:
        """The control of one step; it is made where it is added, part by part.

        Args:
            features: from `draft_features`.
            t: [1] timestep.
            dt: [1] step size.
        """
        freq_dim = self.net.config.freq_dim
        return ControlInputs(features, (sinusoid(t, freq_dim), sinusoid(dt, freq_dim)))

    def velocities(
        self,
        latent: Tensor,
        texts: Sequence[tuple[TextKeysValues, ...]],
        modulation: Modulation,
        at: TokenLayout,
        steering: ControlInputs | None = None,
        on_block: Callable[[], None] = lambda: None,
    ) -> list[Tensor]:
        """What `WanDiT.forward` gives for each text.

        A pass holds the residual stream, queries, keys and values of all tokens and nothing else
        of that size: the rest is made part by part. No text has been seen before the end of the
        first block's self-attention, which all passes share.

        Args:
            latent: [C, T, H, W] fp32, H and W even.
            texts: from `text_keys_values`.
            modulation: from `modulation`, for one row.
            at: from `positions`, of a latent of this shape.
            steering: from `steering`, for the high-res network.
            on_block: called after each block of each pass.

        Returns:
            [C, T, H, W] fp32 for each text.

        Raises:
            ValueError: steering is there and not wanted, or the other way round.
        """
        if (steering is not None) != bool(self.net.config.adapter_dim):
            raise ValueError("the high-res network needs steering, the draft network none")
        first: Tensor | None = None  # [at.padded, N, K] result of the first self-attention
        results: list[Tensor] = []
        for text in texts:
            # The block that the next pass, or the next step, begins with.
            again = int(self._share and len(results) + 1 < len(texts))
            x = self._over(at, "embed", [_padded(patchify(latent), at.padded)])[0]
            x = self._steered(0, x, steering, at)
            y = self._attended(0, x, modulation, at, again) if first is None else first
            first = y if self._share and len(results) + 1 < len(texts) else None
            x = x.float()
            for block, keys in enumerate(text):
                if block > 0:
                    x = self._steered(block, x, steering, at)
                    y = self._attended(block, x, modulation, at, again)
                self._after_attention(at, x, y, modulation, keys, block)
                del y
                on_block()
            out = self._over(at, "head", [x], [modulation.head])[0]
            del x
            results.append(unpatchify(out[: at.tokens], at.positions.grid))
            del out
        return results

    def _steered(
        self, block: int, x: Tensor, steering: ControlInputs | None, at: TokenLayout
    ) -> Tensor:
        """x with the control of this block added to it, where it has one."""
        controlled = self.net.config.control_blocks
        if steering is None or block not in controlled:
            return x
        x, first = x.float(), 0
        for size in self._part_sizes("control", at.tokens):
            features = steering.features[first : first + size]
            rows = size if self._engines["control"].padded else len(features)
            controls = self._run("control", [_padded(features, rows), *steering.steps])
            control = controls[controlled.index(block)]
            x[first : first + len(features)] += control[: len(features)]
            first += size
        return x

    def _attended(
        self, block: int, x: Tensor, modulation: Modulation, at: TokenLayout, again: int
    ) -> Tensor:
        """Self-attention of all tokens, [at.padded, N, K], in the memory of the queries.

        After the last block that of number `again` is the next.
        """
        name = "block_in" if x.dtype == torch.float32 else "block_in_first"
        beside = [modulation.blocks[block], at.positions.cos, at.positions.sin]
        following = block + 1 if block + 1 < self.net.config.num_layers else again
        blocks = (block, following)
        q, k, v = self._over(at, name, [x], beside, blocks=blocks, placed=True)
        # What pads the tokens stays out of the attention, and nothing is read of it afterwards.
        whole, q, k, v = q, *(one[: at.tokens] for one in (q, k, v))
        whole[at.tokens :] = 0
        tokens, count, width = q.shape
        size = heads_at_once(tokens, count, width, q.element_size())
        for heads in zip(*(one.split(size, dim=1) for one in (q, k, v)), strict=True):
            heads[0].copy_(attention(*heads))
        return whole

    def _after_attention(
        self,
        at: TokenLayout,
        x: Tensor,
        y: Tensor,
        modulation: Modulation,
        text: TextKeysValues,
        block: int,
    ) -> None:
        """Run block_out over all parts, each in the place of what it was made from."""
        engine, weights = self._engines["block_out"], self._weights.take("block_out", block)
        beside = [modulation.blocks[block], text.keys, text.values, text.bias]
        for part in at.parts:
            size = part.rows.stop - part.rows.start
            (out,) = _outputs(engine, {"tokens": size}, x.device)
            engine.run([x[part.rows], y[part.rows], *beside, *weights], [out])
            x[part.rows] = out
        self._weights.done("block_out", (block + 1) % self.net.config.num_layers)

    def _part_sizes(self, name: str, tokens: int) -> list[int]:
        """How many tokens an engine takes at a time: of almost one size, or whole chunks."""
        engine = self._engines[name]
        limit = dict(engine.spec.limits)["tokens"]
        if self._part is not None and not engine.padded:
            limit = min(limit, self._part)
        count = -(-tokens // limit)
        if engine.padded:
            return [limit] * count
        return [tokens // count + (index < tokens % count) for index in range(count)]

    def _over(
        self,
        at: TokenLayout,
        name: str,
        tokens: list[Tensor],
        beside: list[Tensor] | None = None,
        *,
        blocks: tuple[int, int] = (0, 0),
        placed: bool = False,
    ) -> list[Tensor]:
        """Run an engine over all parts: on rows of `tokens`, with the same `beside` for each.

        `blocks` are the one whose weights it takes and the one that it will run for next.
        """
        engine = self._engines[name]
        outputs = _outputs(engine, {"tokens": at.padded}, tokens[0].device)
        weights = self._weights.take(name, blocks[0])
        for part in at.parts:
            inputs = [one[part.rows] for one in tokens] + (beside or [])
            inputs += [part.place] if placed else []
            engine.run(inputs + weights, [one[part.rows] for one in outputs])
        self._weights.done(name, blocks[1])
        return outputs

    def _run(self, name: str, inputs: list[Tensor], *, block: int = 0) -> list[Tensor]:
        """Run an engine once."""
        engine = self._engines[name]
        inputs = inputs + self._weights.take(name, block)
        sizes = engine.spec.sizes(inputs)
        outputs = _outputs(engine, sizes, inputs[0].device)
        engine.run(inputs, outputs)
        self._weights.done(name, block + 1)
        return outputs


def heads_at_once(tokens: int, heads: int, width: int, item: int) -> int:
    """Heads whose attention is made at a time, for elements of `item` bytes: as even as can be."""
    most = min(heads, max(1, ATTENTION_BYTES // (tokens * width * item)))
    return -(-heads // -(-heads // most))


def _outputs(engine: Engine, sizes: Mapping[str, int], device: torch.device) -> list[Tensor]:
    """Empty tensors for an engine to fill."""
    specs = engine.spec.outputs
    return [torch.empty(s.sized(sizes), dtype=DTYPES[s.dtype], device=device) for s in specs]


def _padded(x: Tensor, rows: int) -> Tensor:
    """x with zero rows behind it, up to `rows`."""
    return x if len(x) == rows else torch.cat((x, x.new_zeros(rows - len(x), *x.shape[1:])))
