# SPDX-License-Identifier: Apache-2.0
"""A stage's transformer as the plan has it: loaded when it is first used, let go at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType

from pw_engines import EngineStore
from pw_runtime.checkpoint.bundle import Bundle
from pw_runtime.checkpoint.loader import load_dit, require_dit
from pw_runtime.execution.engine_lookup import EngineSet, build_command, choose_engines
from pw_runtime.execution.transformer import SegmentedDiT
from pw_runtime.execution.transformer_segments import segments_of
from pw_runtime.execution.weight_streaming import ResidentWeights, StreamedWeights
from pw_runtime.planning.oom_fallback import OomFallback
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import Stopwatch
from pw_runtime.types import Request, StageName, TransformerPlan


def pick_engines(
    request: Request, bundle: Bundle, stage: StageName, reporter: Reporter
) -> EngineSet:
    """What a network will run on; said once. Raises BadRequest."""
    config = require_dit(bundle, stage)
    segments = segments_of(config, request.precision, request.chunk)
    command = build_command(request, bundle.root)
    # Engines have kernels of their own: with ours asked for, the segments run.
    policy = "eager" if request.kernels == "triton" else request.policy
    choice = choose_engines(segments, policy, EngineStore(), request.device, command)
    if choice.backend != "eager":
        reporter.say(f"the {stage} network runs on {choice.reason} ({choice.backend})")
    elif policy == "auto":
        reporter.say(
            f"the {stage} network runs without engines ({choice.reason}); `{command}` makes them"
        )
    return EngineSet(segments, choice)


def load_transformer(
    request: Request, bundle: Bundle, stage: StageName, picked: EngineSet, plan: TransformerPlan
) -> SegmentedDiT:
    """A network's weights where the plan wants them, on the engines picked for it."""
    net = load_dit(bundle, stage, request.precision, request.device, plan.weights)
    weights = (
        ResidentWeights(net, picked.segments)
        if plan.weights == "resident"
        else StreamedWeights(net, picked.segments, request.precision, request.device)
    )
    engines = picked.choice.engines
    return SegmentedDiT(net, picked.segments, engines, weights, share=plan.share, part=plan.part)


class Loaded:
    """The transformer of one stage, for all clips."""

    def __init__(
        self,
        stage: StageName,
        load: Callable[[], SegmentedDiT],
        fitting: OomFallback,
        watch: Stopwatch,
    ) -> None:
        """Load with `load`, as the plan of `fitting` then is; `watch` counts its seconds."""
        self._stage, self._load, self._fitting, self._watch = stage, load, fitting, watch
        self._net: SegmentedDiT | None = None

    def __enter__(self) -> Loaded:
        """Nothing is loaded yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the network go."""
        self._release()

    def attempt(self, work: Callable[[SegmentedDiT], None], notify: Callable[[str], None]) -> None:
        """Do something with the network, as `OomFallback.attempt`."""

        attempt = partial(self._fitting.attempt, self._stage, release=self._release, notify=notify)

        def loaded() -> SegmentedDiT:
            if self._net is None:
                with self._watch.stage("load", self._stage):
                    self._net = self._load()
            return self._net

        attempt(lambda: work(attempt(loaded, loading=True)))

    def _release(self) -> None:
        if self._net is not None:
            self._net.close()
            self._net = None
