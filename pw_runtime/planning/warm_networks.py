# SPDX-License-Identifier: Apache-2.0
"""Networks and engines that stay loaded between the runs of one process, as far as memory allows.

A run of its own loads every network once and keeps one at a time. A worker of a fleet makes many
runs that differ by their prompts alone: what fits beside the largest stage is then loaded once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, get_args

from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.types import Network, Place, RunOptions, RunPlan, StageMemory

PLACES: Final[tuple[Place, ...]] = get_args(Place)
_NOTHING: Final[Mapping[Place, int]] = MappingProxyType({})


def kept_bytes(memory: StageMemory, place: Place) -> int:
    """Return the bytes of a stage's weights, which remain in memory if its network is kept."""
    kinds = ("weights", "staging")
    return sum(item.bytes for item in memory.items if item.place == place and item.kind in kinds)


def loading_options(options: RunOptions) -> RunOptions:
    """Return the options without those that no network's loading depends on.

    So a run that ends with the draft and one that goes on from it share what is loaded.
    """
    return replace(options, draft_only=False, save_latents=False, codec="h264")


def stages_to_keep(plan: RunPlan) -> frozenset[str]:
    """Return the stages whose networks fit into memory beside the peak of every other stage.

    The heaviest come first: they take the longest to load.
    """
    kept: frozenset[str] = frozenset()
    for memory in sorted(plan.stages, key=_weight, reverse=True):
        if _fits(plan, kept | {memory.stage}):
            kept |= {memory.stage}
    return kept


def bytes_beside(plan: RunPlan, kept: frozenset[str], stage: str, place: Place) -> int:
    """Return the bytes that the kept networks of other stages take while a stage runs."""
    others = (memory for memory in plan.stages if memory.stage in kept - {stage})
    return sum(kept_bytes(memory, place) for memory in others)


def _weight(memory: StageMemory) -> int:
    return sum(kept_bytes(memory, place) for place in PLACES)


def _fits(plan: RunPlan, kept: frozenset[str], others: Mapping[Place, int] = _NOTHING) -> bool:
    """Tell whether every stage fits beside what is kept of the plan, and other networks."""
    limits: dict[Place, int] = {"host": plan.budget.host, "device": plan.budget.device or 0}
    return all(
        memory.peak(place) + bytes_beside(plan, kept, memory.stage, place) + others.get(place, 0)
        <= limit
        for memory in plan.stages
        for place, limit in limits.items()
    )


@dataclass(frozen=True, slots=True)
class _Kept:
    """A loaded network, all that it was loaded from and as, and what ends it."""

    made_of: Hashable
    net: Any
    close: Callable[[Any], None]
    sizes: Mapping[Place, int]


class WarmNetworks:
    """Holds the networks and the engines that the next run of this process will want again.

    Attributes:
        only: stages that are kept, of those that a run's own plan keeps; None: all. For a clip that
            is made in two runs, none of which plans for the networks of the other.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.only: frozenset[str] | None = None
        self._networks: dict[str, _Kept] = {}
        self._engines: dict[Network, tuple[Hashable, EngineSet]] = {}
        self._process: int | None = None

    def process_bytes(self, now: int, *, of_first: bool) -> int:
        """Return the bytes that the process takes beside the kept networks.

        Args:
            now: what it takes at this moment, kept networks included.
            of_first: return what it took before its first run, for a budget that was fixed then.
        """
        if self._process is None:
            self._process = now
        return self._process if of_first else max(self._process, now - self._bytes("host"))

    def engines(
        self, network: Network, made_of: Hashable, select: Callable[[], EngineSet]
    ) -> EngineSet:
        """Return the engines of a network, selected once for what they are made of."""
        known = self._engines.get(network)
        if known is None or known[0] != made_of:
            self._engines[network] = known = (made_of, select())
        return known[1]

    def take(self, stage: str, made_of: Hashable) -> Any | None:
        """Hand over the network of a stage; None where none is kept that was made of the same.

        One that was made of something else is released.
        """
        kept = self._networks.pop(stage, None)
        if kept is None:
            return None
        if kept.made_of != made_of:
            kept.close(kept.net)
            return None
        return kept.net

    def keep(
        self,
        stage: str,
        made_of: Hashable,
        net: Any,
        close: Callable[[Any], None],
        sizes: Mapping[Place, int] = _NOTHING,
    ) -> None:
        """Keep a network, which takes bytes of some places, until it is taken or released."""
        if self.only is not None and stage not in self.only:
            close(net)
            return
        self._networks[stage] = _Kept(made_of, net, close, sizes)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device that the kept networks take."""
        return self._bytes("device")

    def _bytes(self, place: Place) -> int:
        return sum(self._size(stage, place) for stage in self._networks)

    @property
    def is_empty(self) -> bool:
        """True if no network is kept."""
        return not self._networks

    def release(self) -> None:
        """Release all networks that are kept."""
        self.keep_only(frozenset())

    def make_room(self, plan: RunPlan, kept: frozenset[str]) -> None:
        """Release what a plan, which keeps `kept`, takes to be free memory.

        That is every network of its stages that it does not keep or has smaller. Of other stages
        those of `only` stay; without it, the largest that fit beside all that it counts.
        """
        others = self._networks.keys() - {memory.stage for memory in plan.stages}
        larger = {
            memory.stage
            for memory in plan.stages
            for place in PLACES
            if self._size(memory.stage, place) > kept_bytes(memory, place)
        }
        staying = kept - larger
        if self.only is not None:
            self.keep_only(staying | (others & self.only))
            return
        beside: dict[Place, int] = dict.fromkeys(PLACES, 0)
        for stage in sorted(others, key=self._all_of, reverse=True):
            more = {place: beside[place] + self._size(stage, place) for place in PLACES}
            if _fits(plan, kept, more):
                staying, beside = staying | {stage}, more
        self.keep_only(staying)

    def _all_of(self, stage: str) -> int:
        return sum(self._size(stage, place) for place in PLACES)

    def _size(self, stage: str, place: Place) -> int:
        kept = self._networks.get(stage)
        return 0 if kept is None else kept.sizes.get(place, 0)

    def keep_only(self, stages: frozenset[str]) -> None:
        """Release the networks of all other stages."""
        for stage in self._networks.keys() - stages:
            kept = self._networks.pop(stage)
            kept.close(kept.net)
