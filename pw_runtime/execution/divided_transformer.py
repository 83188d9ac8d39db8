# SPDX-License-Identifier: Apache-2.0
"""A transformer on several ranks: each has a run of whole slices of the tokens, and some heads.

Rank 0 is what the stages use; every call is repeated on the other ranks (`follow`). Around
attention, queries, keys and values go to the ranks of their heads, and results come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pw_engines import DTYPES, Engine, dtype_name
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.checkpoint.loader import load_dit
from pw_runtime.errors import RankFailed
from pw_runtime.execution.division import attention_shares, owned_slices
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.execution.gathered_weights import GatheredWeights
from pw_runtime.execution.protocols import ControlInputs, TokenLayout
from pw_runtime.execution.sparse_stage import kept_fraction
from pw_runtime.execution.token_exchange import Division, Exchange
from pw_runtime.execution.transformer import SegmentedDiT, outputs_of, padded_rows
from pw_runtime.execution.transformer_segments import Segment, segment_of_block
from pw_runtime.execution.weight_streaming import (
    ResidentWeights,
    StreamedWeights,
    Weights,
)
from pw_runtime.models import WanDiT
from pw_runtime.models.blocks import TextKeysValues
from pw_runtime.models.dit import Modulation
from pw_runtime.models.embeddings import unpatchify
from pw_runtime.system.ranks import Group, Pending, Ranks
from pw_runtime.types import RunOptions, Split, StageName, TransformerPlan


def load_divided(
    bundle: Bundle,
    stage: StageName,
    engines: EngineSet,
    plan: TransformerPlan,
    options: RunOptions,
    ranks: Ranks,
) -> DividedDiT | None:
    """Load this rank's part of a transformer; None where the plan lets the rank wait.

    All ranks must call it. See `transformer.load_transformer`.
    """
    groups = form_groups(ranks, plan.split)
    if groups is None:
        return None
    device, precision = options.torch_device, options.compute_precision
    kept = "mapped" if plan.weights == "gathered" else plan.weights
    net = load_dit(bundle, stage, precision, device, kept, options.linear)
    loras = bundle.loras.get(stage, ()) if kept == "mapped" else ()
    weights: Weights
    if plan.weights == "gathered":
        weights = GatheredWeights(net, engines.segments, precision, ranks, groups[0], loras)
    elif plan.weights == "resident":
        weights = ResidentWeights(net, engines.segments)
    else:
        weights = StreamedWeights(net, engines.segments, precision, device, loras)
    return DividedDiT(
        net,
        engines.segments,
        engines.engines,
        weights,
        ranks,
        plan.split,
        stage,
        share_attention=plan.share_attention,
        chunk=plan.chunk,
        keep=kept_fraction(options, stage),
    )


class DividedDiT(SegmentedDiT):
    """A WanDiT on engines of several ranks; implements `protocols.Transformer`."""

    def __init__(
        self,
        net: WanDiT,
        segments: Mapping[str, Segment],
        engines: Mapping[str, Engine],
        weights: Weights | None,
        ranks: Ranks,
        split: Split,
        stage: StageName,
        *,
        share_attention: bool = True,
        chunk: int | None = None,
        keep: float | None = None,
    ) -> None:
        """Run `net` on engines of the ranks of a split.

        Args:
            net: the network.
            segments: its segments, by name.
            engines: one for each segment; no whole blocks, no attention.
            weights: provides them; None: they are on the device.
            ranks: this process among all.
            split: how passes, tokens and heads are divided; this rank is among its ranks.
            stage: of the network, for messages.
            share_attention: see `SegmentedDiT`.
            chunk: see `SegmentedDiT`.
            keep: see `SegmentedDiT`; not for more ranks of a pass than heads.
        """
        share = share_attention and split.guidance == 1
        super().__init__(
            net, segments, engines, weights, share_attention=share, chunk=chunk, keep=keep
        )
        if keep is not None and split.sequence > net.config.num_heads:
            raise ValueError("sparse attention takes the queries of a head together")
        self._ranks, self._split, self._stage = ranks, split, stage
        groups = form_groups(ranks, split)
        if groups is None:
            raise ValueError(f"rank {ranks.rank} is not among the {split.ranks} of the split")
        self._active, self._group = groups
        self._pass = ranks.rank // split.sequence  # where each group has a pass of its own
        self._begins = True  # the next text is the first one of a clip
        self._texts: list[tuple[TextKeysValues, ...]] = []
        self._controlled: tuple[Tensor, Tensor] | None = None  # [1] t and dt of the control
        self._stepped: tuple[Tensor, Tensor | None] = (torch.empty(0), None)  # of the modulation
        self._features: Tensor | None = None
        self._division: Division | None = None
        self._steps = 0

    # ---- what the stages call, on rank 0 ---------------------------------------------------

    def text_keys_values(self, context: Tensor) -> tuple[TextKeysValues, ...]:
        """Compute the keys and values of a text, where a pass of this rank takes it, else none.

        Raises RankFailed where weights are gathered and this rank fails: the others wait for it.
        """
        new, self._begins = self._begins, True  # also where this fails: the others have the text
        self._tell("text", context=context, new=new)
        gathered = isinstance(self._weights, GatheredWeights)
        with self._awaited("a text") if gathered else nullcontext():
            text = self._text(context, new=new)
        self._begins = False
        return text

    def modulation(self, t: Tensor, dt: Tensor | None = None) -> Modulation:
        """Compute the modulation rows; see `protocols.Transformer`."""
        self._stepped = (t, dt)
        return super().modulation(t, dt)

    def layout(self, latent: Tensor, clean: int = 0) -> TokenLayout:
        """Divide the tokens of a latent; return those of this rank."""
        self._begins = True  # this clip has all its texts
        self._tell("layout", shape=list(latent.shape), clean=clean)
        return self._divide(latent, clean)

    def control_features(self, draft: Tensor) -> Tensor:
        """Compute the adapter's features, [C, T, H/2, W/2] -> [this rank's tokens, D].

        The group norm in it sees the whole clip: every rank computes all, and keeps its own rows.
        """
        self._tell("features", draft=draft)
        return self._own_features(draft)

    def control_inputs(self, features: Tensor, t: Tensor, dt: Tensor) -> ControlInputs:
        """Collect the control of one step; see `protocols.Transformer`."""
        self._controlled = (t, dt)
        return super().control_inputs(features, t, dt)

    def velocities(
        self,
        latent: Tensor,
        texts: Sequence[tuple[TextKeysValues, ...]],
        modulation: Modulation,
        layout: TokenLayout,
        control: ControlInputs | None = None,
        on_block: Callable[[], None] = lambda: None,
    ) -> list[Tensor]:
        """Compute one velocity per text on all ranks; see `protocols.Transformer`.

        Raises RankFailed, also where this rank runs out of memory: the others wait for it.
        """
        t, dt = self._stepped
        self._tell(
            "velocities",
            latent=latent,
            t=t.tolist(),
            dt=None if dt is None else dt.tolist(),
            control=None if control is None else [x.tolist() for x in self._controlled or ()],
        )
        with self._awaited("a step"):
            return self._collected(latent, texts, modulation, layout, control, on_block)

    def close(self) -> None:
        """Release the weights on all ranks."""
        if not self._ranks.failed and self._ranks.rank == 0:
            self._ranks.command("release")
        super().close()

    # ---- the other ranks ---------------------------------------------------------------------

    def follow(self, command: Mapping[str, Any]) -> None:
        """Repeat a call of rank 0 on this one."""
        match command["name"]:
            case "text":
                self._text(self._told(command, "context"), new=command["new"])
            case "layout":
                latent = torch.empty(command["shape"], device=self._ranks.device)
                self._divide(latent, command["clean"])
            case "features":
                self._features = self._own_features(self._told(command, "draft"))
            case "velocities":
                self._velocities_of(command)
            case name:
                raise ValueError(f"unknown command {name}")

    def _velocities_of(self, command: Mapping[str, Any]) -> None:
        latent = self._told(command, "latent")
        device = latent.device

        def numbers(values: list[float] | None) -> Tensor | None:
            return None if values is None else torch.tensor(values, device=device)

        t = numbers(command["t"])
        assert t is not None
        assert self._division is not None
        modulation = super().modulation(t, numbers(command["dt"]))
        control = None
        if command["control"] is not None:
            assert self._features is not None
            steps = [torch.tensor(values, device=device) for values in command["control"]]
            control = super().control_inputs(self._features, steps[0], steps[1])
        self._share(latent, self._texts, modulation, self._division.mine, control)

    def _share(
        self,
        latent: Tensor,
        texts: Sequence[tuple[TextKeysValues, ...]],
        modulation: Modulation,
        layout: TokenLayout,
        control: ControlInputs | None,
    ) -> None:
        """Compute this rank's part of the velocities and send it to rank 0."""
        for rows in self._own_passes(latent, texts, modulation, layout, control, lambda: None):
            self._ranks.send(rows.reshape(-1), 0, "velocities").wait()

    @contextmanager
    def _awaited(self, part: str) -> Iterator[None]:
        """End the run where rank 0 fails in a part for which the others wait. Raises RankFailed."""
        try:
            yield
        except RankFailed:
            raise
        except Exception as error:
            self._ranks.fail(error)
            text = f"rank 0 failed in the middle of {part}: {error}"
            raise RankFailed(text, do="`pw docs parallel`; for memory: a smaller plan") from None
        except BaseException as error:  # an interrupt; the others are in the middle of the part
            self._ranks.fail(error)
            raise

    # ---- on every rank -----------------------------------------------------------------------

    def _tell(self, name: str, **details: Any) -> None:
        """Send a command to the others, and the tensors in it to those that compute."""
        tensors = {key: x for key, x in details.items() if isinstance(x, Tensor)}
        shapes = {key: [dtype_name(x.dtype), *x.shape] for key, x in tensors.items()}
        self._ranks.command(name, **{**details, **shapes})
        for key, x in tensors.items():
            flat = x.contiguous().view(-1)
            self._ranks.broadcast(flat, f"{key} of a {name}", group=self._active).wait()

    def _told(self, command: Mapping[str, Any], key: str) -> Tensor:
        """Receive a tensor of a command."""
        dtype, *shape = command[key]
        x = torch.empty(shape, dtype=DTYPES[dtype], device=self._ranks.device)
        what = f"{key} of a {command['name']}"
        self._ranks.broadcast(x.view(-1), what, group=self._active).wait()
        return x

    def _text(self, context: Tensor, *, new: bool) -> tuple[TextKeysValues, ...]:
        """Compute a text; the first one of a `new` clip frees what is kept of the last clip."""
        if new:
            self._texts, self._division, self._features = [], None, None
        self._ranks.at(f"{self._stage}, text")
        mine = self._split.guidance == 1 or self._pass == len(self._texts)
        # Computed in any case: where weights are divided, all ranks must ask for them.
        text = super().text_keys_values(context)
        self._texts.append(text if mine else ())
        return self._texts[-1]

    def _divide(self, latent: Tensor, clean: int) -> TokenLayout:
        whole = super().layout(latent, clean)
        count, own = len(whole.slices), self._group.rank
        owned = owned_slices(count, self._split.sequence)
        shares = attention_shares(self.net.config.num_heads, count, self._split.sequence)
        slices = whole.slices[owned[own].start : owned[own].stop]
        if not slices:
            raise ValueError(f"{count} slices of tokens for {self._split.sequence} ranks")
        first = slices[0].rows.start
        mine = replace(
            whole,
            tokens=min(slices[-1].rows.stop, whole.tokens) - first,
            padded=slices[-1].rows.stop - first,
            slices=tuple(
                replace(part, rows=slice(part.rows.start - first, part.rows.stop - first))
                for part in slices
            ),
            first=first,
        )
        self._division, self._steps = Division(whole, mine, owned, shares), 0
        return mine

    def _own_features(self, draft: Tensor) -> Tensor:
        assert self._division is not None
        mine = self._division.mine
        features = super().control_features(draft)
        return features[mine.first : mine.first + mine.tokens].clone()

    def _own_passes(
        self,
        latent: Tensor,
        texts: Sequence[tuple[TextKeysValues, ...]],
        modulation: Modulation,
        layout: TokenLayout,
        control: ControlInputs | None,
        on_block: Callable[[], None],
    ) -> Iterator[Tensor]:
        """Yield this rank's rows of the velocities of its passes."""
        self._steps += 1
        self._ranks.at(f"{self._stage}, step {self._steps}")
        own = texts if self._split.guidance == 1 else [texts[self._pass]]
        return self._passes(latent, own, modulation, layout, control, on_block)

    def _collected(
        self,
        latent: Tensor,
        texts: Sequence[tuple[TextKeysValues, ...]],
        modulation: Modulation,
        layout: TokenLayout,
        control: ControlInputs | None,
        on_block: Callable[[], None],
    ) -> list[Tensor]:
        """Compute rank 0's part of the velocities, and collect those of the others."""
        division, split = self._division, self._split
        assert division is not None
        results, width = [], 0
        computed = iter(self._own_passes(latent, texts, modulation, layout, control, on_block))
        for index in range(len(texts)):
            group = index if split.guidance > 1 else 0
            rows = next(computed) if group == 0 else None
            width = width if rows is None else rows.shape[1]
            whole = latent.new_empty(division.whole.tokens, width)
            if rows is not None:
                whole[: len(rows)] = rows
                del rows
            waiting: list[Pending] = []
            for member in range(split.sequence):
                rank = group * split.sequence + member
                if rank:
                    part = whole[division.tokens(division.owned[member])]
                    waiting.append(self._ranks.receive(part.view(-1), rank, "velocities"))
            for pending in waiting:
                pending.wait()
            results.append(unpatchify(whole, division.whole.positions.grid))
        return results

    def _self_attention(
        self,
        block: int,
        x: Tensor,
        modulation: Modulation,
        layout: TokenLayout,
        next_pass_block: int,
    ) -> Tensor:
        """Run self-attention of this rank's tokens over all tokens: [layout.padded, N, K]."""
        assert self._division is not None
        exchange = Exchange(self._ranks, self._group, self._division, self.net.config.num_heads)
        name = "block_in" if x.dtype == torch.float32 else "block_in_first"
        engine = self._engines[segment_of_block(self.net, name, block)]
        positions = layout.positions
        weights = self._weights.acquire(name, block)
        for index in range(exchange.rounds):
            if index < len(layout.slices):
                part = layout.slices[index]
                q, k, v = outputs_of(engine, {"tokens": part.size}, x.device)
                rows = modulation.blocks[block][part.row : part.row + 1]
                inputs = [part.of(x), rows, positions.cos, positions.sin, part.origin]
                engine.run(inputs + weights, [q, k, v])
                exchange.send(index, q, k, v)
                del q, k, v
            else:
                exchange.send(index)
        last = block + 1 == self.net.config.num_layers
        self._weights.release(name, block, next_pass_block if last else block + 1)
        exchange.attend(self._attend(positions.grid))
        return padded_rows(exchange.results(), layout.padded)


def form_groups(ranks: Ranks, split: Split) -> tuple[Group, Group] | None:
    """Form the groups of a split: all that compute, and those that share a pass with this rank.

    All ranks must call it; None for those that wait.
    """
    active = ranks.group("computing", tuple(range(split.ranks)))
    own = None
    for group in range(split.guidance):
        first = group * split.sequence
        formed = ranks.group("one pass", tuple(range(first, first + split.sequence)))
        own = own or formed
    return None if active is None or own is None else (active, own)
