# SPDX-License-Identifier: Apache-2.0
"""A transformer on engines: segments over slices of the tokens, attention between them.

Its engines say how a block is divided: attention is an engine where there is one for it, and a
block is one call where there is an engine for all of it. What is not compiled (attention otherwise,
the adapter's backbone, a few rows of numbers) is the network's own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pw_engines import DTYPES, SMALLEST, Engine
from pw_kernels import attention, sparse_attention
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.checkpoint.loader import load_dit
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.execution.protocols import ControlInputs, TokenLayout, TokenSlice
from pw_runtime.execution.sparse_stage import kept_fraction
from pw_runtime.execution.step_replay import StepReplay
from pw_runtime.execution.transformer_segments import (
    POSITIONS,
    Segment,
    heads_at_once,
    segment_of_block,
)
from pw_runtime.execution.weight_streaming import ResidentWeights, StreamedWeights, Weights
from pw_runtime.models import WanDiT
from pw_runtime.models.blocks import TextKeysValues
from pw_runtime.models.dit import Modulation
from pw_runtime.models.embeddings import Positions, patchify, rope_tables, sinusoid, unpatchify
from pw_runtime.models.finite import require_finite_weights
from pw_runtime.types import RunOptions, StageName, TransformerPlan


def load_transformer(
    bundle: Bundle,
    stage: StageName,
    engines: EngineSet,
    plan: TransformerPlan,
    options: RunOptions,
    say: Callable[[str], None] = lambda text: None,
) -> SegmentedDiT:
    """Load a transformer as the plan places its weights, on the engines selected for it."""
    device, precision = options.torch_device, options.compute_precision
    net = load_dit(bundle, stage, precision, device, plan.weights, options.linear)
    loras = bundle.loras.get(stage, ()) if plan.weights == "mapped" else ()
    weights: Weights = (
        ResidentWeights(net, engines.segments)
        if plan.weights == "resident"
        else StreamedWeights(net, engines.segments, precision, device, loras)
    )
    resident_eager = plan.weights == "resident" and engines.backend == "eager"
    return SegmentedDiT(
        net,
        engines.segments,
        engines.engines,
        weights,
        share_attention=plan.share_attention,
        chunk=plan.chunk,
        replay=StepReplay(say) if device.type == "cuda" and resident_eager else None,
        keep=kept_fraction(options, stage),
    )


class SegmentedDiT:
    """A WanDiT on engines; implements `protocols.Transformer`."""

    def __init__(
        self,
        net: WanDiT,
        segments: Mapping[str, Segment],
        engines: Mapping[str, Engine],
        weights: Weights | None = None,
        *,
        share_attention: bool = True,
        chunk: int | None = None,
        replay: StepReplay | None = None,
        keep: float | None = None,
    ) -> None:
        """Run `net` on engines.

        Args:
            net: the network.
            segments: its segments, by name.
            engines: one for each segment.
            weights: provides them; None: they are on the device.
            share_attention: let the passes of one step share the first block's self-attention,
                whose result is kept during the first pass. Both ways give the same bits. Whole
                blocks have nothing to share.
            chunk: most tokens per call, where that is less than the engines take.
            replay: records the steps of small clips without control, and replays them.
            keep: fraction of the blocks of keys that self-attention keeps; None: it is exact.

        Raises:
            ValueError: an engine was made for another segment.
        """
        self.net, self._engines = net, dict(engines)
        for name, segment in segments.items():
            if self._engines[name].spec != segment.spec:
                raise ValueError(f"the engine for {name} was made for another segment")
        self._weights = weights or ResidentWeights(net, segments)
        self._whole_blocks = "block" in engines
        self._share_attention = share_attention and not self._whole_blocks
        self._chunk, self._keep, self._replay = chunk, keep, replay

    def check_weights(self) -> None:
        """Raise BadWeights for weights that are not finite; see `protocols.Transformer`."""
        require_finite_weights(self.net)

    def forget(self) -> None:
        """Free what is kept of the last clip: the recorded step, and the texts that it reads."""
        if self._replay is not None:
            self._replay.forget()

    def close(self) -> None:
        """Release what provides the weights; nothing can run afterwards."""
        self.forget()
        self._weights.close()

    def text_keys_values(self, context: Tensor) -> tuple[TextKeysValues, ...]:
        """Compute the keys and values of a text; see `protocols.Transformer`."""
        self.forget()  # of the last clip, before that of the next one takes its memory
        context, bias = self.net.padded_text(context)
        limit = dict(self._engines["text_embed"].spec.limits)["text"]
        if self._engines["text_embed"].padded:
            missing = limit - len(context)
            context = torch.cat((context, context.new_zeros(missing, context.shape[1])))
            bias = torch.cat((bias, bias.new_full((missing,), float("-inf"))))
        (embedded,) = self._run("text_embed", [context])
        text = []
        for block in range(self.net.config.num_layers):
            keys, values = self._run("text_keys_values", [embedded], block=block)
            text.append(TextKeysValues(keys, values, bias))
        return tuple(text)

    def modulation(self, t: Tensor, dt: Tensor | None = None) -> Modulation:
        """Compute the modulation rows, each in a call; see `protocols.Transformer`."""
        steps = [sinusoid(x, self.net.config.freq_dim) for x in (t, dt) if x is not None]
        by_row = zip(*(step.split(1) for step in steps), strict=True)
        results = [self._run("modulation", list(inputs)) for inputs in by_row]
        rows, e = (torch.cat(parts) for parts in zip(*results, strict=True))
        return self.net.block_rows(rows, e)

    def layout(self, latent: Tensor, clean: int = 0) -> TokenLayout:
        """Divide the tokens of a latent; see `protocols.Transformer`."""
        if clean and self._whole_blocks:
            raise ValueError("engines of whole blocks take all tokens with one timestep")
        positions = self.net.positions(latent)
        tables = rope_tables(POSITIONS, self.net.config.head_dim, latent.device)
        tokens = math.prod(positions.grid)
        border = tokens // positions.grid[0] * clean
        parts = [(0, border), (border, tokens)] if clean else [(0, tokens)]
        slices = []
        for row, (start, stop) in enumerate(parts):
            for rows, copied in self._calls("embed", start, stop, apart=bool(clean)):
                origin = positions.place + positions.place.new_tensor([rows.start, 0, 0])
                slices.append(TokenSlice(rows, origin, row, copied))
        padded = Positions(positions.grid, *tables, positions.place)
        return TokenLayout(padded, tokens, slices[-1].rows.stop, tuple(slices))

    def control_features(self, draft: Tensor) -> Tensor:
        """Compute the adapter's features of a draft; see `protocols.Transformer`."""
        return self.net.draft_features(draft)

    def control_inputs(self, features: Tensor, t: Tensor, dt: Tensor) -> ControlInputs:
        """Collect the control of one step; see `protocols.Transformer`."""
        freq_dim = self.net.config.freq_dim
        return ControlInputs(features, (sinusoid(t, freq_dim), sinusoid(dt, freq_dim)))

    def velocities(
        self,
        latent: Tensor,
        texts: Sequence[tuple[TextKeysValues, ...]],
        modulation: Modulation,
        layout: TokenLayout,
        control: ControlInputs | None = None,
        on_block: Callable[[], None] = lambda: None,
    ) -> list[Tensor]:
        """Compute what `WanDiT.forward` gives for each text; see `protocols.Transformer`.

        A pass holds the residual stream, queries, keys and values of all tokens and nothing else
        of that size; the rest is computed slice by slice. Until the end of the first block's
        self-attention no text has been read, so all passes share it. A whole block is one call,
        and a pass holds the residual stream before and after it.
        """
        if (control is not None) != bool(self.net.config.adapter_dim):
            raise ValueError("the high-res network needs control, the draft network takes none")
        rows = max(part.row for part in layout.slices) + 1
        if modulation.head.shape[0] != rows:
            got = modulation.head.shape[0]
            raise ValueError(f"the layout is for {rows} modulation rows, got {got}")
        if self._replay is None or control is not None:
            return self._step(latent, texts, modulation, layout, control, on_block)
        results = self._replay.velocities(
            lambda x, rows: self._step(x, texts, rows, layout, None, lambda: None),
            latent,
            texts,
            modulation,
            layout,
        )
        for _ in range(sum(map(len, texts))):
            on_block()
        return results

    def _step(
        self,
        latent: Tensor,
        texts: Sequence[tuple[TextKeysValues, ...]],
        modulation: Modulation,
        layout: TokenLayout,
        control: ControlInputs | None,
        on_block: Callable[[], None],
    ) -> list[Tensor]:
        """Compute one velocity per text, [C, T, H, W] fp32."""
        results = []
        for rows in self._passes(latent, texts, modulation, layout, control, on_block):
            results.append(unpatchify(rows, layout.positions.grid))
            del rows  # free the memory for the next pass
        return results

    def _passes(
        self,
        latent: Tensor,
        texts: Sequence[tuple[TextKeysValues, ...]],
        modulation: Modulation,
        layout: TokenLayout,
        control: ControlInputs | None,
        on_block: Callable[[], None],
    ) -> Iterator[Tensor]:
        """Yield the velocities of the layout's tokens for each text, [layout.tokens, 4 C] fp32."""
        shared_attention: Tensor | None = None  # [layout.padded, N, K] of the first block
        tokens = slice(layout.first, layout.first + layout.tokens)
        for index, text in enumerate(texts):
            share = self._share_attention and index + 1 < len(texts)
            next_pass_block = int(share)  # where the next pass, or the next step, begins
            patches = padded_rows(patchify(latent)[tokens], layout.padded)
            x = self._run_sliced(layout, "embed", patches)[0]
            del patches
            for block, keys_values in enumerate(text):
                x = self._add_control(block, x, control, layout)
                if self._whole_blocks:
                    x = self._whole_block(block, x, modulation, layout, keys_values)
                    on_block()
                    continue
                y = shared_attention if block == 0 else None
                if y is None:
                    y = self._self_attention(block, x, modulation, layout, next_pass_block)
                if block == 0:
                    shared_attention = y if share else None
                x = x.float()
                self._after_attention(layout, x, y, modulation, keys_values, block)
                del y
                on_block()
            out = self._run_sliced(layout, "head", x, modulation.head)[0]
            del x
            yield out[: layout.tokens]
            del out

    def _add_control(
        self, block: int, x: Tensor, control: ControlInputs | None, layout: TokenLayout
    ) -> Tensor:
        """Add the control of this block to x, where it has one."""
        controlled = self.net.config.control_blocks
        if control is None or block not in controlled:
            return x
        x = x.float()
        for token_slice in layout.slices:
            rows = token_slice.rows
            count = len(control.features[rows])
            features = padded_rows(token_slice.of(control.features), token_slice.size)
            controls = self._run("control", [features, *control.steps])
            added = controls[controlled.index(block)]
            x[rows.start : rows.start + count] += added[:count]
        return x

    def _self_attention(
        self,
        block: int,
        x: Tensor,
        modulation: Modulation,
        layout: TokenLayout,
        next_pass_block: int,
    ) -> Tensor:
        """Run self-attention over all tokens: [layout.padded, N, K], in the memory of the queries.

        After the last block, block `next_pass_block` runs next.
        """
        name = "block_in" if x.dtype == torch.float32 else "block_in_first"
        positions = layout.positions
        rotary = (positions.cos, positions.sin)
        last = block + 1 == self.net.config.num_layers
        blocks = (block, next_pass_block if last else block + 1)
        rows = modulation.blocks[block]
        q, k, v = self._run_sliced(layout, name, x, rows, rotary, blocks=blocks)
        # Padding rows stay out of the attention, and nothing reads them afterwards.
        result = q
        q, k, v = (tensor[: layout.tokens] for tensor in (q, k, v))
        result[layout.tokens :] = 0
        tokens, heads, width = q.shape
        size = heads_at_once(tokens, heads, width, q.element_size())
        attend = self._attend(positions.grid)
        for group in zip(*(tensor.split(size, dim=1) for tensor in (q, k, v)), strict=True):
            group[0].copy_(attend(*group))
        return result

    def _attend(self, grid: tuple[int, int, int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return self-attention over all tokens of a grid, for q, k and v of some heads."""
        if self._keep is not None:
            return partial(sparse_attention, grid=grid, keep=self._keep)
        return self._attention_engine if "attention" in self._engines else attention

    def _attention_engine(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run the engine of attention over some heads, [S, heads, K], which it takes first."""
        inputs = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
        (out,) = self._run("attention", inputs)
        return out[0].transpose(0, 1)

    def _whole_block(
        self,
        block: int,
        x: Tensor,
        modulation: Modulation,
        layout: TokenLayout,
        text: TextKeysValues,
    ) -> Tensor:
        """Run a block in one call: [S, D] -> [S, D] fp32. The first block of a pass follows."""
        name = "block" if x.dtype == torch.float32 else "block_first"
        positions = layout.positions
        inputs = [x, modulation.blocks[block], positions.cos, positions.sin, positions.place]
        inputs += [text.keys, text.values, text.bias]
        next_block = (block + 1) % self.net.config.num_layers
        (out,) = self._run(name, inputs, block=block, next_block=next_block)
        return out

    def _after_attention(
        self,
        layout: TokenLayout,
        x: Tensor,
        y: Tensor,
        modulation: Modulation,
        text: TextKeysValues,
        block: int,
    ) -> None:
        """Run block_out over all slices; each result takes the place of its input in x."""
        engine = self._engines[segment_of_block(self.net, "block_out", block)]
        weights = self._weights.acquire("block_out", block)
        for part in layout.slices:
            (out,) = outputs_of(engine, {"tokens": part.size}, x.device)
            rows = modulation.blocks[block][part.row : part.row + 1]
            inputs = [part.of(x), part.of(y), rows, text.keys, text.values, text.bias]
            engine.run(inputs + weights, [out])
            x[part.rows] = out[: part.rows.stop - part.rows.start]
        self._weights.release("block_out", block, (block + 1) % self.net.config.num_layers)

    def _calls(
        self, name: str, start: int, stop: int, *, apart: bool
    ) -> Iterator[tuple[slice, int | None]]:
        """Yield the rows of each call of an engine, and its size where it takes a copy of them.

        Args:
            name: of the engine.
            start: first token of those that it takes.
            stop: end of these.
            apart: the rows around them are not of these calls. Else they are all tokens, and the
                engine's padding follows in every token buffer.
        """
        granularity = self._engines[name].granularity
        for size in self._slice_sizes(name, stop - start):
            rows = slice(start, min(start + size, stop) if apart else start + size)
            fits = rows.stop - rows.start == size and rows.start % granularity == 0
            yield rows, None if fits else size
            start = rows.stop

    def _slice_sizes(self, name: str, tokens: int) -> list[int]:
        """Return how many tokens each call of an engine takes: nearly equal, or whole chunks."""
        engine = self._engines[name]
        limit = dict(engine.spec.limits)["tokens"]
        if self._chunk is not None and not engine.padded:
            limit = min(limit, self._chunk)
        count = -(-tokens // limit)
        if engine.padded:
            return [limit] * count
        if engine.granularity > 1:
            return _aligned_sizes(tokens, limit, engine.granularity)
        return [tokens // count + (index < tokens % count) for index in range(count)]

    def _run_sliced(
        self,
        layout: TokenLayout,
        name: str,
        tokens: Tensor,
        rows: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        *,
        blocks: tuple[int, int] = (0, 0),
    ) -> list[Tensor]:
        """Run an engine over all slices of `tokens`, each with its row of the modulation.

        `rotary` are the tables, which each slice's origin follows; `blocks` are the block whose
        weights it takes and the block that it will run for next.
        """
        engine = self._engines[segment_of_block(self.net, name, blocks[0])]
        outputs = outputs_of(engine, {"tokens": layout.padded}, tokens.device)
        weights = self._weights.acquire(name, blocks[0])
        for part in layout.slices:
            inputs = [part.of(tokens)]
            inputs += [] if rows is None else [rows[part.row : part.row + 1]]
            inputs += [] if rotary is None else [*rotary, part.origin]
            if part.copied is None:
                engine.run(inputs + weights, [x[part.rows] for x in outputs])
                continue
            results = outputs_of(engine, {"tokens": part.size}, tokens.device)
            engine.run(inputs + weights, results)
            for x, result in zip(outputs, results, strict=True):
                x[part.rows] = result[: part.rows.stop - part.rows.start]
        self._weights.release(name, *blocks)
        return outputs

    def _run(
        self, name: str, inputs: list[Tensor], *, block: int = 0, next_block: int = 0
    ) -> list[Tensor]:
        """Run an engine once, with the weights of a block; it will run for `next_block` next."""
        engine = self._engines[name]
        inputs = inputs + self._weights.acquire(name, block)
        sizes = engine.spec.sizes(inputs)
        outputs = outputs_of(engine, sizes, inputs[0].device)
        engine.run(inputs, outputs)
        self._weights.release(name, block, next_block)
        return outputs


def outputs_of(engine: Engine, sizes: Mapping[str, int], device: torch.device) -> list[Tensor]:
    """Allocate the tensors that an engine fills."""
    specs = engine.spec.outputs
    return [torch.empty(s.sized(sizes), dtype=DTYPES[s.dtype], device=device) for s in specs]


def _aligned_sizes(tokens: int, limit: int, granularity: int) -> list[int]:
    """Divide tokens into whole chunks and a rest, which begins at a multiple of `granularity`."""
    limit -= limit % granularity if limit > granularity else 0
    sizes = [limit] * (tokens // limit)
    rest = tokens % limit
    if 0 < rest < SMALLEST and sizes:  # engines take no single row
        moved = min(granularity, limit - 1)
        sizes[-1] -= moved
        rest += moved
    return [*sizes, rest] if rest else sizes


def padded_rows(x: Tensor, rows: int) -> Tensor:
    """Append zero rows to x, up to `rows`."""
    return x if len(x) == rows else torch.cat((x, x.new_zeros(rows - len(x), *x.shape[1:])))
