# SPDX-License-Identifier: Apache-2.0
"""The ways a run takes through its stages, and the next one where memory ran out all the same."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pw_engines import EngineError
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import BadResult
from pw_runtime.execution.engine_lookup import EngineSet
from pw_runtime.planning.planner import Candidate, Candidates, candidates, fits, make_plan, plan_of
from pw_runtime.planning.workload import budget_of, workload_of
from pw_runtime.system.machine import peak_memory, reset_peak_memory, return_freed_memory
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import span
from pw_runtime.types import Budget, Network, Place, Request, RunPlan

Result = TypeVar("Result")


class OomFallback:
    """The plan of a run as it goes on: a stage that runs out of memory takes its next way.

    Attributes:
        plan: as it is now.
        measured: peak bytes by stage, of the process and of the device's allocator.
    """

    def __init__(self, ways: Candidates, budget: Budget, device: torch.device) -> None:
        """Make the plan. Raises BadRequest where nothing fits."""
        self.plan: RunPlan = make_plan(ways, budget)
        self.measured: dict[str, dict[str, int]] = {}
        self._ways = ways
        self._at = {
            stage: next(i for i, way in enumerate(ladder) if fits(way.memory, budget))
            for stage, ladder in ways.items()
        }
        self._device = device

    @contextmanager
    def measuring(self, stage: str) -> Iterator[None]:
        """Take the peak of what happens inside for that of the stage."""
        free_memory(self._device)  # of the stages before
        reset_peak_memory(self._device)
        try:
            yield
        finally:
            self.measure(stage)

    def measure(self, stage: str) -> None:
        """Note the peak since the stage began."""
        self.measured[stage] = peak_memory(self._device)

    def peaks(self) -> dict[str, int]:
        """The highest of all stages, by place."""
        places = {place for peaks in self.measured.values() for place in peaks}
        return {p: max(peaks.get(p, 0) for peaks in self.measured.values()) for p in sorted(places)}

    def attempt(
        self,
        stage: str,
        work: Callable[[], Result],
        release: Callable[[], None],
        notify: Callable[[str], None],
        *,
        loading: bool = False,
    ) -> Result:
        """Do something of a stage; where memory runs out, do it again in a smaller way.

        Args:
            stage: that the work belongs to.
            work: reads the plan each time, and leaves everything as before where it fails.
            release: lets go what was loaded for the way so far.
            notify: told that, and how it goes on.
            loading: the weights are what does not fit: only ways with less of them help.

        Raises:
            Whatever `work` raises where memory is not the reason or no way is left.
        """
        while True:
            try:
                return work()
            except Exception as error:
                lacking = out_of_memory(error)
                smaller = self._smaller(stage, loading=loading) if lacking else None
                if lacking is None or smaller is None:
                    raise
                text = str(lacking.got)
            # Out of the block above, which holds the tensors of what failed.
            self._at[stage] = smaller
            taken: Mapping[str, Candidate[Any]] = {
                name: ways[self._at[name]] for name, ways in self._ways.items()
            }
            told = f"{stage}: memory ran out ({text}); it goes on with {taken[stage].name}"
            notify(told)
            self.plan = plan_of(self.plan.budget, taken, (*self.plan.decisions, told))
            release()
            # Only here: what failed may hang in a cycle of tracebacks, what ended well does not,
            # and going through all objects of a program takes a sixth of a second.
            gc.collect()
            free_memory(self._device)

    def _smaller(self, stage: str, *, loading: bool) -> int | None:
        """The next way of a stage that takes less where memory is short, and fits the budget."""
        ways, budget = self._ways[stage], self.plan.budget
        now = ways[self._at[stage]]
        place: Place = "host" if budget.device is None else "device"
        for index in range(self._at[stage] + 1, len(ways)):
            way = ways[index]
            less = way.memory.peak(place) < now.memory.peak(place)
            if less and fits(way.memory, budget) and (way.weights < now.weights or not loading):
                return index
        return None

    def account(self) -> dict[str, Any]:
        """For the receipt: what was decided, predicted and measured, in bytes."""
        return {
            "budget": {"host": self.plan.budget.host, "device": self.plan.budget.device},
            "decisions": list(self.plan.decisions),
            "stages": {
                one.stage: {
                    "predicted": {
                        place: one.peak(place)
                        for place in ("host", "device")
                        if place == "host" or self.plan.budget.device is not None
                    },
                    "measured": self.measured.get(one.stage),
                }
                for one in self.plan.stages
            },
        }


def free_memory(device: torch.device) -> None:
    """Give what was freed back to the system and the device."""
    with span("free memory"):
        return_freed_memory()
        if device.type == "cuda":
            torch.cuda.empty_cache()


# What PyTorch, CUDA, its libraries and TensorRT say.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|could not allocate|alloc_failed",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> BadResult | None:
    """The one clear error for what torch, Python and engines raise when memory runs out."""
    found: BaseException | None = error
    while found is not None:
        kinds = (MemoryError, torch.OutOfMemoryError)
        words = isinstance(found, RuntimeError | EngineError) and _OUT_OF_MEMORY.search(str(found))
        if isinstance(found, kinds) or words:
            return BadResult(
                "memory ran out",
                got=str(found).splitlines()[0] if str(found) else type(found).__name__,
                do="free memory, take a smaller preset or fewer frames, or bf16: --precision for "
                "the transformers, --vae-precision for the decode; `pw plan` says what each takes",
            )
        found = found.__cause__
    return None


def fit(
    request: Request,
    bundle: Bundle,
    reporter: Reporter,
    engines: Mapping[Network, EngineSet],
    *,
    decode_only: bool = False,
) -> OomFallback:
    """The plan of a run, or of its decode alone, said line by line. Raises BadRequest where nothing
    fits."""
    padded = any(
        one.padded
        for name, on in engines.items()
        for one in on.choice.engines.values()
        if name != "vae"
    )
    decoder_engines = engines["vae"].choice.backend != "eager"
    work = workload_of(
        request,
        bundle.networks,
        padded=padded,
        decoder_engines=decoder_engines,
        decode_only=decode_only,
    )
    budget = budget_of(request.device, request.gpu_memory, request.host_memory)
    ways = candidates(work, gpu=budget.device is not None, decode_only=decode_only)
    fitting = OomFallback(ways, budget, request.device)
    for decision in fitting.plan.decisions:
        reporter.say(decision)
    return fitting
