# SPDX-License-Identifier: Apache-2.0
"""The end of `pw build` on a CPU: engines measured beside their segments, and which will run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pw_engines import Speed
    from pw_export.build_jobs import Job
    from pw_runtime.checkpoint.bundle import Bundle
    from pw_runtime.execution.compilers import CompilerName
    from pw_runtime.system.progress import Reporter
    from pw_runtime.types import Preset, RunOptions

NO_DECODER: Final = (
    "no engines for the decoder: on a CPU its own convolutions are as fast or faster "
    "(--backend aoti builds them all the same)"
)


def show_speeds(
    jobs: Sequence[Job],
    bundle: Bundle,
    options: RunOptions,
    preset: Preset | None,
    reporter: Reporter,
) -> bool:
    """Measure engines that are not measured yet, print the figures and what will run.

    Args:
        jobs: of the transformers, and of the decoder, which are left out.
        bundle: whose networks they are.
        options: of the build.
        preset: whose sizes are measured; None: a few sizes.
        reporter: prints them.

    Returns:
        True if an engine computed something else than its segment, and was removed.
    """
    from pw_engines import EngineStore
    from pw_export.build_speed import TOKENS, measure_jobs
    from pw_runtime.execution.engine_lookup import measured_ratios
    from pw_runtime.execution.engine_records import step_ratio
    from pw_runtime.execution.transformer_segments import segments_of

    tokens = TOKENS
    if preset is not None:
        tokens = tuple(stage.tokens(preset.video) for stage in preset.stages().values())
    store = EngineStore()
    built = [
        job
        for job in jobs
        if not job.segment.startswith("vae_") and store.find(job.key).path is not None
    ]
    lines, removed = [], False
    for measured in measure_jobs(built, tokens):
        removed = removed or measured.removed
        if measured.error is not None:
            reporter.warn(f"{measured.job.key.folder}: {measured.error}")
        elif measured.speed is not None:
            lines.append(_line(measured.job, measured.speed))
    for line in [_HEADING, *lines] if lines else ():
        reporter.say(line)
    networks = {"draft": bundle.networks.draft, "highres": bundle.networks.highres}
    for name, network in networks.items():
        if network is None:
            continue
        segments = segments_of(
            network.config, options.compute_precision, options.chunk, options.linear
        )
        counts = tokens
        if preset is not None:
            counts = tuple(s.tokens(preset.video) for n, s in preset.stages().items() if n == name)
        for count in counts:
            ratio = partial(step_ratio, config=network.config, linear=options.linear, tokens=count)
            ratios = measured_ratios(segments, store, options.torch_device, ratio)
            if ratios:
                reporter.say(_verdict(f"{name} network, {count} tokens", ratios))
    return removed


_HEADING: Final = (
    f"{'segment':<18} {'engine':<9} {'tokens':>7} {'ms':>9} {'eager ms':>9} {'ratio':>7}  error"
)


def _line(job: Job, speed: Speed) -> str:
    return (
        f"{job.segment:<18} {job.compiler:<9} {speed.tokens or '':>7} {1e3 * speed.seconds:9.3f} "
        f"{1e3 * speed.eager:9.3f} {speed.ratio:6.2f}x  {speed.error:.1e}"
    )


def _verdict(name: str, ratios: Mapping[CompilerName, float]) -> str:
    """Say which engines a network will run on, and how they compare."""
    best = max(ratios, key=lambda label: ratios[label])
    figures = ", ".join(f"{label} {ratio:.2f}x" for label, ratio in ratios.items())
    runs = f"runs on {best}" if ratios[best] >= 1 else "runs uncompiled, as no engine is faster"
    return f"{name}: a step but for attention is {figures} as fast as uncompiled: {runs}"
