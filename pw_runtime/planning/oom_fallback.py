# SPDX-License-Identifier: Apache-2.0
"""The plan of a run in progress: where a stage runs out of memory, it takes its next candidate."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Concatenate, Final, Generic, ParamSpec, TypeVar

import torch

from pw_engines import EngineError
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import BadResult
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.planning.candidates import Candidate, Candidates, candidates
from pw_runtime.planning.planner import fits, gib, make_plan, plan_of
from pw_runtime.planning.stage_times import expected_seconds
from pw_runtime.planning.warm_networks import (
    PLACES,
    WarmNetworks,
    bytes_beside,
    kept_bytes,
    stages_to_keep,
)
from pw_runtime.planning.workload import (
    budget_of,
    empty_caches,
    request_workload,
)
from pw_runtime.system.machine import peak_memory, reset_peak_memory, return_freed_memory
from pw_runtime.system.step import Step
from pw_runtime.system.trace import Stopwatch, span
from pw_runtime.types import Budget, Network, Place, Request, RunPlan, StageMemory

LOG: Final = logging.getLogger("pw_runtime")
Net = TypeVar("Net")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class OomFallback:
    """The plan of a run, which changes when a stage runs out of memory.

    Attributes:
        plan: the current plan.
        kept: stages whose networks stay loaded after them; none in a run of its own.
        measured: peak bytes by stage, of the process and of the device's allocator.
        expected: seconds of one clip by stage, of which only the ratios count.
    """

    def __init__(
        self, stages: Candidates, budget: Budget, device: torch.device, *, warm: bool = False
    ) -> None:
        """Make the plan; `warm` keeps networks loaded. Raises BadRequest where nothing fits."""
        self.plan: RunPlan = make_plan(stages, budget)
        self.measured: dict[str, dict[str, int]] = {}
        self.expected: Mapping[str, float] = {}
        self._stages = stages
        self._index = {
            stage: next(i for i, option in enumerate(options) if fits(option.memory, budget))
            for stage, options in stages.items()
        }
        self._device = device
        self._warm = warm
        self.kept = stages_to_keep(self.plan) if warm else frozenset[str]()

    def choice(self, stage: str) -> Hashable:
        """Return what the current plan says about a stage."""
        choice: Hashable = self._stages[stage][self._index[stage]].choice
        return choice

    def memory_of(self, stage: str) -> StageMemory:
        """Return the memory at the peak of a stage, as currently planned."""
        return next(memory for memory in self.plan.stages if memory.stage == stage)

    def spare_host(self, stage: str) -> int:
        """Return the bytes of the host budget that the current plan of a stage leaves."""
        beside = bytes_beside(self.plan, self.kept, stage, "host")
        return self.plan.budget.host - self.memory_of(stage).required("host") - beside

    @contextmanager
    def track_peak(self, stage: str) -> Iterator[None]:
        """Record the peak memory inside the block as the stage's."""
        free_memory(self._device)  # left by earlier stages
        reset_peak_memory(self._device)
        try:
            yield
        finally:
            self.record_peak(stage)

    def record_peak(self, stage: str) -> None:
        """Record the peak since the stage began."""
        self.measured[stage] = peak_memory(self._device)
        LOG.debug("peak memory of %s, bytes: %s", stage, self.measured[stage])

    def peaks(self) -> dict[str, int]:
        """Return the highest peak of all stages, by place."""
        places = {place for peaks in self.measured.values() for place in peaks}
        return {p: max(peaks.get(p, 0) for peaks in self.measured.values()) for p in sorted(places)}

    def next_smaller(self, stage: str, *, loading: bool) -> int | None:
        """Find the stage's next candidate that takes less of the scarce memory and fits the budget.

        Args:
            stage: the stage that ran out of memory.
            loading: the weights did not fit: only candidates with smaller weights help.

        Returns:
            Its index, or None where there is none.
        """
        options, budget = self._stages[stage], self.plan.budget
        current = options[self._index[stage]]
        scarce: Place = "host" if budget.device is None else "device"
        for index in range(self._index[stage] + 1, len(options)):
            option = options[index]
            smaller = option.memory.required(scarce) < current.memory.required(scarce)
            lighter = option.weights(scarce) < current.weights(scarce) or not loading
            if smaller and lighter and fits(option.memory, budget):
                return index
        return None

    def fall_back(self, stage: str, index: int, cause: str) -> str:
        """Change the plan to another candidate of a stage; return the message about it."""
        self._index[stage] = index
        chosen: Mapping[str, Candidate[Any]] = {
            name: options[self._index[name]] for name, options in self._stages.items()
        }
        message = f"{stage}: out of memory ({cause}); retrying with {chosen[stage].name}"
        self.plan = plan_of(self.plan.budget, chosen, (*self.plan.decisions, message))
        self.kept = stages_to_keep(self.plan) if self._warm else self.kept
        return message

    def collect_garbage(self) -> None:
        """Free what a failed attempt left."""
        # why only after failures: tracebacks can form cycles, what ended well does not, and
        # visiting all objects of a program takes a sixth of a second.
        gc.collect()
        free_memory(self._device)

    def memory_report(self) -> dict[str, Any]:
        """Return decisions and predicted and measured peaks, in bytes, for the receipt."""
        budget = self.plan.budget
        places: tuple[Place, ...] = ("host",) if budget.device is None else ("host", "device")
        return {
            "budget": {"host": budget.host, "device": budget.device},
            "decisions": list(self.plan.decisions),
            "stages": {
                memory.stage: {
                    "predicted": {
                        place: memory.peak(place)
                        + bytes_beside(self.plan, self.kept, memory.stage, place)
                        for place in places
                    },
                    "measured": self.measured.get(memory.stage),
                }
                for memory in self.plan.stages
            },
        }


class LazyNetwork(Generic[Net]):
    """The network of a stage: loaded at first use, and again, smaller, after running out of memory.

    A context manager that releases the network at its end, or leaves it to the next run of the
    process where the plan keeps it.
    """

    def __init__(
        self,
        stage: str,
        load: Callable[[RunPlan], Net],
        fallback: OomFallback,
        stopwatch: Stopwatch,
        *,
        label: str,
        close: Callable[[Net], None] = lambda net: None,
        rest: Callable[[Net], None] = lambda net: None,
        warm: WarmNetworks | None = None,
        made_of: Hashable = None,
    ) -> None:
        """Load with `load` as the current plan says; `stopwatch` counts the seconds as "load".

        `label` names the network in traces. `close` runs before the network is released, and `rest`
        before it is kept: it frees all but the weights.
        `warm` has the networks that earlier runs kept, and `made_of` is what `load` reads beside
        the plan.
        """
        self._stage, self._load, self._close, self._rest = stage, load, close, rest
        self._fallback, self._stopwatch, self._label = fallback, stopwatch, label
        self._warm, self._made_of = warm, made_of
        self._net: Net | None = None

    def __enter__(self) -> LazyNetwork[Net]:
        """Load nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the network, or keep it where the stage ended well and the plan says so."""
        keep = kind is None and self._stage in self._fallback.kept
        if self._warm is not None and self._net is not None and keep:
            self._rest(self._net)
            memory = self._fallback.memory_of(self._stage)
            sizes = {place: kept_bytes(memory, place) for place in PLACES}
            self._warm.keep(self._stage, self._identity(), self._net, self._close, sizes)
            self._net = None
        self._release()

    def run(
        self,
        step: Step,
        compute: Callable[Concatenate[Net, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Return `compute(network, *args, **kwargs)`; retry with a smaller plan when out of memory.

        Args:
            step: shows the progress of each attempt, and tells the user about a fallback.
            compute: leaves everything as before where it fails.
            args: its further arguments.
            kwargs: its keyword arguments.

        Raises:
            Whatever loading or `compute` raises, where memory is not the cause or no smaller
            candidate is left.
        """
        while True:
            try:
                if self._net is None and self._warm is not None:
                    self._net = self._warm.take(self._stage, self._identity())
                if self._net is None:
                    with self._stopwatch.stage("load", self._label):
                        self._net = self._load(self._fallback.plan)
                with step.attempt():
                    return compute(self._net, *args, **kwargs)
            except Exception as error:
                cause = out_of_memory(error)
                if cause is None:
                    raise
                index = self._fallback.next_smaller(self._stage, loading=self._net is None)
                warm = self._warm is not None and not self._warm.is_empty
                if index is None and not warm:
                    raise
                reason = str(cause.got)
            # Outside the block above, whose exception holds the tensors of what failed.
            if warm:
                self._release_warm(step, reason)
            elif index is not None:
                step.add_notice("fallback", self._fallback.fall_back(self._stage, index, reason))
                self._release()
            self._fallback.collect_garbage()

    def _identity(self) -> Hashable:
        return self._made_of, self._fallback.choice(self._stage)

    def _release_warm(self, step: Step, reason: str) -> None:
        """Make room for another attempt with the same plan: its result is the same."""
        assert self._warm is not None
        self._warm.release()
        step.reporter.warn(
            f"{self._stage}: out of memory ({reason}); the networks that were kept for later clips "
            "are released, and it is tried again"
        )

    def _release(self) -> None:
        if self._net is not None:
            self._close(self._net)
            self._net = None


def free_memory(device: torch.device) -> None:
    """Return freed memory to the system and to the device."""
    with span("free memory"):
        return_freed_memory()
        if device.type == "cuda":
            empty_caches()


# In the words of PyTorch, CUDA, its libraries and TensorRT.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|could not allocate|alloc_failed",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> BadResult | None:
    """Return one clear error for what torch, Python and engines raise when out of memory."""
    cause: BaseException | None = error
    while cause is not None:
        kinds = (MemoryError, torch.OutOfMemoryError)
        words = isinstance(cause, RuntimeError | EngineError) and _OUT_OF_MEMORY.search(str(cause))
        if isinstance(cause, kinds) or words:
            return BadResult(
                "out of memory",
                got=str(cause).splitlines()[0] if str(cause) else type(cause).__name__,
                do="free memory, choose a smaller preset or fewer frames, or bf16: --precision for "
                "the transformers, --vae-precision for the decode; `pw plan` shows what each takes",
            )
        cause = cause.__cause__
    return None


def plan_run(
    request: Request,
    bundle: Bundle,
    say: Callable[[str], None],
    engines: Mapping[Network, EngineSet],
    *,
    needed: Collection[str] | None = None,
    ranks: int = 1,
    budget: Budget | None = None,
    warm: WarmNetworks | None = None,
) -> OomFallback:
    """Plan a run, or its decode alone, and report every decision.

    Args:
        request: what to make.
        bundle: the converted checkpoint.
        say: takes the decisions.
        engines: that were selected.
        needed: the stages that run beside the decode; None: all of them.
        ranks: that make a clip together.
        budget: of each of them; None: of this process.
        warm: keeps networks loaded for the next run where that fits; those of earlier runs that
            this plan leaves no room for are released.

    Raises BadRequest where nothing fits.
    """
    work = request_workload(
        bundle.networks,
        request,
        loras=bundle.loras,
        padded=any(engines[stage].padded for stage in request.stages if stage in engines),
        decoder_engines=engines["vae"].backend != "eager",
        scratch={network: engine_set.scratch for network, engine_set in engines.items()},
        needed=needed,
        ranks=ranks,
    )
    if warm is not None:
        of_first = request.host_memory is not None  # what is free now lacks what came since
        work = replace(work, process=warm.process_bytes(work.process, of_first=of_first))
    if budget is None:
        held = work.held_scratch + (0 if warm is None else warm.device_bytes)
        limits = request.gpu_memory, request.host_memory
        budget = budget_of(request.device, *limits, held=held)
    stages = candidates(work, gpu=budget.device is not None, needed=needed)
    fallback = OomFallback(stages, budget, request.device, warm=warm is not None)
    if warm is not None:
        warm.make_room(fallback.plan, fallback.kept)
    fallback.expected = expected_seconds(work, fallback.plan)
    if fallback.kept:
        decisions = (*fallback.plan.decisions, _kept_text(fallback))
        fallback.plan = replace(fallback.plan, decisions=decisions)
    for decision in fallback.plan.decisions:
        say(decision)
    return fallback


def _kept_text(fallback: OomFallback) -> str:
    stages = [memory for memory in fallback.plan.stages if memory.stage in fallback.kept]
    size = sum(kept_bytes(memory, place) for memory in stages for place in PLACES)
    names = ", ".join(memory.stage for memory in stages)
    return f"kept loaded for the next clips: {names}, {gib(size)}"
