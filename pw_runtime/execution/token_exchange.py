# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values on their way to the ranks of their heads, and the results back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pw_runtime.execution.division import AttentionShare
from pw_runtime.execution.protocols import TokenLayout
from pw_runtime.execution.transformer_segments import heads_at_once
from pw_runtime.system.ranks import Group, Pending, Ranks

ROUNDS = 2  # slices whose queries, keys and values are under way at a time


@dataclass(frozen=True, slots=True)
class Division:
    """All tokens of a clip and the heads of a pass, divided among the ranks of a group."""

    whole: TokenLayout
    mine: TokenLayout
    owned: tuple[range, ...]  # slices, by rank
    shares: tuple[AttentionShare, ...]  # by rank

    def tokens(self, slices: range) -> slice:
        """Return the tokens of consecutive slices, without the padding of the last one."""
        if not slices:
            return slice(0, 0)
        start = self.whole.slices[slices.start].rows.start
        stop = self.whole.slices[slices.stop - 1].rows.stop
        return slice(start, min(stop, self.whole.tokens))


class Exchange:
    """Queries, keys and values of one self-attention on their way, and its results back."""

    def __init__(self, ranks: Ranks, group: Group, division: Division, heads: int) -> None:
        self._ranks, self._group, self._division = ranks, group, division
        self._heads, self._share = heads, division.shares[group.rank]
        self._queries = division.tokens(self._share.slices)
        self._full: tuple[Tensor, Tensor, Tensor] | None = None  # q, k, v of this rank's heads
        self._rounds: list[tuple[int, Tensor, Pending]] = []
        self._like: Tensor | None = None

    @property
    def rounds(self) -> int:
        """Number of slices of the rank with the most."""
        return max(map(len, self._division.owned))

    def send(self, index: int, *qkv: Tensor) -> None:
        """Send this rank's slice of a round, if it has one, and receive those of the others.

        Args:
            index: of the round.
            qkv: queries, keys and values of the slice, [rows, N, K] each.
        """
        own = self._division.owned[self._group.rank]
        if qkv:
            self._like = qkv[0]
        assert self._like is not None, "every rank has a slice in the first round"
        parts, sent = [], []
        for share in self._division.shares:
            taken = []
            if qkv:
                number = own[index]
                rows = self._rows(number)
                heads = slice(share.heads.start, share.heads.stop)
                chosen = qkv if number in share.slices else qkv[1:]
                taken = [x[: rows.stop - rows.start, heads].reshape(-1) for x in chosen]
            parts += taken
            sent.append(sum(map(len, taken)))
        x = torch.cat(parts) if parts else self._like.new_empty(0)
        received = [self._numbers(slices, index) for slices in self._division.owned]
        result = self._like.new_empty(sum(received))
        pending = self._ranks.exchange(
            self._group, result, x, received, sent, "queries, keys, values"
        )
        self._rounds.append((index, result, pending))
        if len(self._rounds) >= ROUNDS:
            self._take()

    def attend(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Run attention of this rank's heads and queries, in the memory of the queries."""
        while self._rounds:
            self._take()
        assert self._full is not None
        q, k, v = self._full
        size = heads_at_once(len(k), q.shape[1], q.shape[2], q.element_size())
        for group in zip(*(x.split(size, dim=1) for x in (q, k, v)), strict=True):
            group[0].copy_(attention(*group))
        self._full = (q, q[:0], q[:0])  # keys and values are not needed any more

    def results(self) -> Tensor:
        """Return the results of this rank's tokens: [tokens, N, K]."""
        assert self._full is not None
        q, division, own = self._full[0], self._division, self._group.rank
        row = q[:1].numel()
        sent = [self._common(slices, self._share) * row for slices in division.owned]
        mine = division.owned[own]
        received = [
            self._common(mine, share) * len(share.heads) * q.shape[2] for share in division.shares
        ]
        result = q.new_empty(sum(received))
        self._ranks.exchange(
            self._group, result, q.view(-1), received, sent, "results of attention"
        ).wait()
        del q
        self._full = None
        tokens = division.tokens(mine)
        y = result.new_empty(tokens.stop - tokens.start, self._heads, row // len(self._share.heads))
        for part, share in zip(result.split(received), division.shares, strict=True):
            rows = division.tokens(_overlap(mine, share.slices))
            target = y[rows.start - tokens.start : rows.stop - tokens.start]
            if part.numel():
                heads = slice(share.heads.start, share.heads.stop)
                target[:, heads] = part.view(-1, len(share.heads), y.shape[2])
        return y

    def _take(self) -> None:
        """Wait for a round, and put what came where it belongs."""
        index, result, pending = self._rounds.pop(0)
        pending.wait()
        if self._full is None:
            assert self._like is not None
            shape = (len(self._share.heads), self._like.shape[2])
            keys = [result.new_empty(self._division.whole.tokens, *shape) for _ in range(2)]
            queries = result.new_empty(self._queries.stop - self._queries.start, *shape)
            self._full = (queries, keys[0], keys[1])
        position = 0
        for slices in self._division.owned:
            if index >= len(slices):
                continue
            number = slices[index]
            rows = self._rows(number)
            q, k, v = self._full
            places = [k[rows], v[rows]]
            if number in self._share.slices:
                start = rows.start - self._queries.start
                places.insert(0, q[start : start + rows.stop - rows.start])
            for place in places:
                place.copy_(result[position : position + place.numel()].view(place.shape))
                position += place.numel()

    def _numbers(self, slices: range, index: int) -> int:
        """Count the numbers that come in a round from a rank with these slices."""
        if index >= len(slices):
            return 0
        assert self._like is not None
        rows, number = self._rows(slices[index]), slices[index]
        kinds = 3 if number in self._share.slices else 2
        row = len(self._share.heads) * self._like.shape[2]
        return kinds * (rows.stop - rows.start) * row

    def _rows(self, number: int) -> slice:
        """Return the tokens of a slice, without padding."""
        return self._division.tokens(range(number, number + 1))

    def _common(self, slices: range, share: AttentionShare) -> int:
        """Count the tokens of slices whose queries a share takes."""
        rows = self._division.tokens(_overlap(slices, share.slices))
        return rows.stop - rows.start


def _overlap(one: range, other: range) -> range:
    """Return what two runs have in common."""
    start, stop = max(one.start, other.start), min(one.stop, other.stop)
    return range(start, max(start, stop))
