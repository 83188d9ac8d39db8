# SPDX-License-Identifier: Apache-2.0
"""The planner's word on every preset on offer, before any job: its fit and its time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Final

from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.errors import BadRequest
from pw_runtime.planning.candidates import candidates
from pw_runtime.planning.planner import make_plan
from pw_runtime.planning.stage_times import seconds_by_stage
from pw_runtime.planning.time_estimate import Rates
from pw_runtime.planning.warm_networks import stages_to_keep
from pw_runtime.planning.workload import Workload, workload
from pw_runtime.server.messages import Fit
from pw_runtime.system.machine import rss_bytes
from pw_runtime.types import Budget, Preset, RunOptions, RunPlan

REMEMBERED: Final = 64  # plans: a third of a second each at 4K


class Admission:
    """Plans of one worker, within the memory that it had at its start."""

    def __init__(self, bundle: Bundle, options: RunOptions, budget: Budget, rates: Rates) -> None:
        """Plan with a bundle and options; `rates` are the device's, for times."""
        self._bundle, self._options = bundle, options
        self._budget, self._rates = budget, rates
        self._process = rss_bytes()  # without the networks that later jobs keep loaded
        self._plan = lru_cache(REMEMBERED)(self._make_plan)
        self._seconds = lru_cache(REMEMBERED)(self._estimate)

    def fits(self, presets: Mapping[str, Preset]) -> dict[str, Fit]:
        """Return the planner's word on every preset."""
        return {name: self._fit(preset) for name, preset in presets.items()}

    def seconds(self, preset: Preset, *, draft_only: bool) -> Mapping[str, float]:
        """Estimate the seconds of each stage. Raises BadRequest where the clip does not fit."""
        return self._seconds(preset, draft_only)

    def kept(self, preset: Preset, *, draft_only: bool) -> frozenset[str]:
        """Return the stages whose networks may stay loaded. Raises BadRequest."""
        return stages_to_keep(self._plan(preset, draft_only))

    def _make_plan(self, preset: Preset, draft_only: bool) -> RunPlan:
        work = self._work(preset, draft_only)
        return make_plan(candidates(work, gpu=self._budget.device is not None), self._budget)

    def _estimate(self, preset: Preset, draft_only: bool) -> Mapping[str, float]:
        work, plan = self._work(preset, draft_only), self._plan(preset, draft_only)
        return seconds_by_stage(work, plan, self._rates)

    def _work(self, preset: Preset, draft_only: bool) -> Workload:
        options = replace(self._options, draft_only=draft_only)
        work = workload(self._bundle.networks, preset, options, loras=self._bundle.loras)
        return replace(work, process=self._process)

    def _fit(self, preset: Preset) -> Fit:
        try:
            seconds = self.seconds(preset, draft_only=False)
        except BadRequest as error:
            return Fit(fits=False, draft_fits=self._draft_fits(preset), reason=str(error))
        return Fit(fits=True, draft_fits=True, seconds=seconds)

    def _draft_fits(self, preset: Preset) -> bool:
        try:
            self._plan(preset, True)
        except BadRequest:
            return False
        return True
