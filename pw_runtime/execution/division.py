# SPDX-License-Identifier: Apache-2.0
"""Division of a transformer's work among ranks, in whole slices of tokens and whole heads.

A rank computes what is done token by token for a run of slices, and attention for a run of heads.
Every call then has the size that it has on one device, so its result has the same bits: tensors
are moved, and nothing is ever added up across ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pw_runtime.types import DitConfig, Split


@dataclass(frozen=True, slots=True)
class AttentionShare:
    """The part of self-attention that one rank computes."""

    heads: range
    slices: range  # of the tokens whose queries it takes; keys and values are those of all


def run_of(count: int, parts: int, part: int) -> range:
    """Return one of `parts` runs of `count` things, nearly equal, the longer ones first."""
    size, longer = divmod(count, parts)
    start = part * size + min(part, longer)
    return range(start, start + size + (part < longer))


def owned_slices(slices: int, ranks: int) -> tuple[range, ...]:
    """Return the slices of tokens that each rank owns: at least one, for at most that many."""
    return tuple(run_of(slices, ranks, rank) for rank in range(ranks))


def attention_shares(heads: int, slices: int, ranks: int) -> tuple[AttentionShare, ...]:
    """Divide the heads among the ranks; where they are too few, also the queries of a head.

    No rank merges results over parts of the keys, as ring attention does: that would add up, and
    keys and values of the few heads of a rank are small.
    """
    if ranks <= heads:
        return tuple(
            AttentionShare(run_of(heads, ranks, rank), range(slices)) for rank in range(ranks)
        )
    shares = []
    for head in range(heads):
        sharing = len(run_of(ranks, heads, head))
        shares += [
            AttentionShare(range(head, head + 1), run_of(slices, sharing, part))
            for part in range(sharing)
        ]
    return tuple(shares)


def slice_sizes(tokens: int, chunk: int, *, padded: bool = False) -> tuple[int, ...]:
    """Return the tokens of each engine call: nearly equal, or whole chunks with padding."""
    count = -(-tokens // chunk)
    return tuple(chunk if padded else len(run_of(tokens, count, i)) for i in range(count))


@dataclass(frozen=True, slots=True)
class RankShare:
    """The part of a stage that one rank computes and holds."""

    slices: int
    own: int  # tokens of its slices
    heads: int  # of self-attention
    queries: int  # tokens whose queries it takes
    passes: int  # of every step


def rank_share(
    config: DitConfig, split: Split, sizes: Sequence[int], *, passes: int, rank: int = 0
) -> RankShare:
    """Return the share of a rank that computes; see `step_traffic` for the arguments."""
    place = rank % split.sequence
    own = owned_slices(len(sizes), split.sequence)[place]
    share = attention_shares(config.num_heads, len(sizes), split.sequence)[place]
    return RankShare(
        slices=len(own),
        own=sum(sizes[i] for i in own),
        heads=len(share.heads),
        queries=sum(sizes[i] for i in share.slices),
        passes=len(run_of(passes, split.guidance, rank // split.sequence)),
    )


@dataclass(frozen=True, slots=True)
class RankTraffic:
    """Bytes that one rank exchanges in one block of one pass."""

    sent: int
    received: int


def block_traffic(
    config: DitConfig, ranks: int, sizes: Sequence[int], itemsize: int
) -> tuple[RankTraffic, ...]:
    """Count what each of the ranks of a pass sends and receives around one self-attention.

    Queries, keys and values go to the ranks of their heads, and results come back.
    """
    owned = owned_slices(len(sizes), ranks)
    shares = attention_shares(config.num_heads, len(sizes), ranks)
    row = config.head_dim * itemsize  # bytes of one head of one token
    sent, received = [0] * ranks, [0] * ranks
    for rank, slices in enumerate(owned):
        for other, share in enumerate(shares):
            if other == rank:
                continue
            queries = sum(sizes[i] for i in slices if i in share.slices)
            there = len(share.heads) * row * (queries + 2 * sum(sizes[i] for i in slices))
            back = len(share.heads) * row * queries
            sent[rank] += there
            received[other] += there
            sent[other] += back
            received[rank] += back
    return tuple(map(RankTraffic, sent, received))


def frames_begun(ranks: int) -> int:
    """Return the most latent frames of a divided decode that not all ranks have finished.

    The last rank is behind the first one by about a tenth of a frame for every rank between.
    """
    return 1 + -(-(ranks - 1) // 4)


@dataclass(frozen=True, slots=True)
class StepTraffic:
    """Bytes that all ranks together send in one step of a stage."""

    exchange: int  # queries, keys, values to the ranks of their heads, and results back
    weights: int  # of blocks whose weights are divided among the ranks
    latents: int  # the latent to all ranks, and velocities back to the first one

    @property
    def total(self) -> int:
        """All of them."""
        return self.exchange + self.weights + self.latents


def step_traffic(
    config: DitConfig,
    split: Split,
    sizes: Sequence[int],
    *,
    passes: int,
    itemsize: int,
    share_attention: bool = True,
    block_bytes: int = 0,
) -> StepTraffic:
    """Count the bytes that one step moves between ranks.

    Args:
        config: of the transformer.
        split: of its work.
        sizes: tokens of every slice.
        passes: of a step.
        itemsize: bytes of a number in queries, keys and values.
        share_attention: the passes of a rank share the first block's self-attention.
        block_bytes: of all weights of all blocks where each rank keeps its share of them, padded
            to equal shares; 0 where every rank has all of them.
    """
    moved = sum(rank.sent for rank in block_traffic(config, split.sequence, sizes, itemsize))
    owned = owned_slices(len(sizes), split.sequence)
    patch = 4 * 4 * config.out_dim  # bytes of a token's velocity, 2x2 fp32 patches
    at_first = sum(sizes[i] for i in owned[0]) * (-(-passes // split.guidance))
    velocities = patch * (passes * sum(sizes) - at_first)
    latent = 4 * 4 * config.in_dim * sum(sizes) * (split.ranks - 1)
    gathered = passes // split.guidance * block_bytes * (split.ranks - 1)
    shared = share_attention and split.guidance == 1 and passes > 1
    self_attentions = passes * config.num_layers - shared
    return StepTraffic(
        exchange=self_attentions * moved, weights=gathered, latents=velocities + latent
    )
