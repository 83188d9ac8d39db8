# SPDX-License-Identifier: Apache-2.0
"""Every stage by itself, from whole clips made one after the other in one warm process.

    pw bench stages --preset nano --out FILE

What is timed is `pw generate` itself: a figure collects the spans of one name over all clips.
Where the arithmetic of a stage is known, its share of the measured ceilings is given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from pw_bench.choices import OURS, ProgramName, SyntheticSize
from pw_bench.e2e.job import ClipFacts, Job
from pw_bench.e2e.programs import CONTENDERS
from pw_bench.e2e.synthetic import IN_MEMORY
from pw_bench.e2e.weights import make_job, pick_weights, scope_of
from pw_bench.measure.environment import envelope, identify
from pw_bench.measure.interruption import Interruption
from pw_bench.measure.nvml import Nvml, skipped_without_gpu
from pw_bench.measure.peaks import measure_ceilings
from pw_bench.measure.timing import FULL
from pw_bench.results import Ceilings, Figure, Result
from pw_runtime.checkpoint.bundle import Networks, open_bundle
from pw_runtime.execution.sparse_stage import kept_fraction
from pw_runtime.job.checks import pick_device
from pw_runtime.planning.time_estimate import Rates, decode_seconds, denoise_seconds
from pw_runtime.presets import find_preset
from pw_runtime.system.progress import Reporter
from pw_runtime.system.trace import Span, Trace
from pw_runtime.types import (
    DitConfig,
    Precision,
    Preset,
    RunOptions,
    StageConfig,
    StageName,
    TransformerPlan,
)

# Spans that make up a figure. Steps are named by the stage around them.
SPANS: Final = (
    "check networks",
    "plan",
    "check files",
    "load text encoder",
    "text",
    "load draft",
    "load highres",
    "condition",
    "latents",
    "load vae",
    "first chunk",
    "chunk",
    "pack",
    "encode",
    "mux",
    "receipt",
)
SCOPE: Final = "stages of `pw generate`, clip after clip in one process"


@dataclass(frozen=True, slots=True, kw_only=True)
class MinimumWork:
    """Minimum arithmetic of a stage, and the time that it takes at the ceilings."""

    flops: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Clips one after the other: their figures, the facts of the last one, how they ended."""

    figures: tuple[Figure, ...]
    facts: ClipFacts
    interruption: Interruption


def measure_stages(
    preset_name: str,
    *,
    checkpoint: Path | None,
    synthetic: SyntheticSize | None,
    steps: int | None,
    clips: int,
    cold: bool,
    precision: Precision | None,
    device_name: str,
    side: ProgramName = OURS,
) -> Result:
    """Measure every stage of a clip.

    Args:
        preset_name: as for `pw generate`.
        checkpoint: folder of weights in the official layout.
        synthetic: size of random weights instead.
        steps: of each denoising stage, at most.
        clips: clips that count.
        cold: count the first clip too.
        precision: of the transformers; None for the device's default.
        device_name: as for `pw generate`.
        side: which of this runtime's programs makes the clips.

    Raises BadRequest, BadWeights; Interrupted with the clips that were made before.
    """
    device, preset = pick_device(device_name), find_preset(preset_name)
    if steps is not None:
        preset = limit_steps(preset, steps)
    reporter, nvml = Reporter(), Nvml(device.index or 0)
    identity = identify(device, nvml)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = pick_weights(preset_name, checkpoint, synthetic, folder, reporter.say)
        job = make_job(weights, preset, folder, device, precision)
        ceilings = measure_ceilings(device, FULL)
        series = time_stages(job, clips, ceilings, reporter, cold=cold, side=side)
    words = f"{SCOPE}, {'none' if cold else 'the first'} left out: {CONTENDERS[side].description}"
    identity = replace(
        identity,
        weights={weights.name: weights.digest},
        engines=series.facts.engines,
        operations=series.facts.operations,
    )
    interrupted = series.interruption.skipped("the remaining clips")
    result = replace(
        envelope("stages", scope_of(job, weights) | {"words": words}, identity, ceilings, nvml),
        figures=series.figures,
        skipped=(*skipped_without_gpu(device), *interrupted),
    )
    return series.interruption.ended_with(result)


def time_stages(
    job: Job,
    clips: int,
    ceilings: Ceilings,
    reporter: Reporter,
    *,
    cold: bool = False,
    side: ProgramName = OURS,
) -> Series:
    """Make clips, one more than counted unless `cold`: the first warms the process up.

    A signal ends the series early.
    """
    program, device = CONTENDERS[side].make(), torch.device(job.device)
    traces: list[list[Span]] = []
    made: list[ClipFacts] = []
    left_out = 0 if cold else 1
    with tempfile.TemporaryDirectory() as folder, Interruption() as interruption:
        for number in range(clips + left_out):
            trace = Trace(device)
            with trace.recording():
                facts = program.clip(job, Path(folder) / f"{number}.mp4")
            traces.append(trace.spans)
            made.append(facts)
            reporter.say(f"clip {number + 1} of {clips + left_out}")
    interruption.require(made[left_out:])
    networks = IN_MEMORY[job.in_memory] if job.in_memory else open_bundle(job.bundle).networks
    work = minimum_work(networks, job.preset, ceilings, made[-1].options)
    fallbacks = {text for facts in made for text in facts.fallbacks}
    figures = figures_of(traces[left_out:], work, tuple(sorted(fallbacks)))
    if peaks := [one.peaks["device"] for one in made[left_out:] if "device" in one.peaks]:
        figures.append(Figure(name="GPU memory", unit="B", samples=tuple(peaks)))
    return Series(figures=tuple(figures), facts=made[-1], interruption=interruption)


def limit_steps(preset: Preset, steps: int) -> Preset:
    """Return the preset with at most `steps` steps: each is timed by itself."""
    draft, highres = preset.draft, preset.highres
    return replace(
        preset,
        draft=replace(draft, steps=min(steps, draft.steps)),
        highres=highres and replace(highres, steps=min(steps, highres.steps)),
    )


def minimum_work(
    networks: Networks, preset: Preset, ceilings: Ceilings, options: RunOptions
) -> dict[str, MinimumWork]:
    """Return the work of the figures whose arithmetic is known; for steps, the mean.

    That of a step is not, where some are extrapolated or lack a pass, or where the products are in
    a format whose rate was not measured.
    """
    count = Rates(matmul=1.0, attention=1.0, conv=1.0, copy=1.0, source="arithmetic alone")
    best = Rates(
        matmul=ceilings.gemm.rate,
        attention=ceilings.attention.rate,
        # Libraries turn some convolutions into matrix products, which may be the faster ones.
        conv=max(ceilings.convolution.rate, ceilings.gemm.rate),
        copy=ceilings.copy.rate,
        source="measured",
    )
    video = preset.video

    def step(name: StageName, config: DitConfig, stage: StageConfig) -> MinimumWork:
        keep = kept_fraction(options, name)
        flops, seconds = (
            denoise_seconds(config, stage, video, TransformerPlan(), rates, keep=keep) / stage.steps
            for rates in (count, best)
        )
        return MinimumWork(flops=flops, seconds=seconds)

    vae, last = networks.vae.config, list(preset.stages().values())[-1]

    def decode(frames: int) -> MinimumWork:
        flops, seconds = (
            decode_seconds(vae, last, replace(video, frames=frames), rates)
            for rates in (count, best)
        )
        return MinimumWork(flops=flops, seconds=seconds)

    work, exact = {}, options.linear == "exact"
    if exact and options.step_cache is None:
        work["draft step"] = step("draft", networks.draft.config, preset.draft)
    if exact and not options.guidance_reuse and preset.highres is not None:
        assert networks.highres is not None
        work["highres step"] = step("highres", networks.highres.config, preset.highres)
    first, both = decode(1), decode(5)
    later = MinimumWork(flops=both.flops - first.flops, seconds=both.seconds - first.seconds)
    return work | {"first chunk": first, "chunk": later}


def figures_of(
    traces: Iterable[Iterable[Span]],
    work: Mapping[str, MinimumWork],
    fell_back: tuple[str, ...] = (),
) -> list[Figure]:
    """Return one figure for each name of span, in the order in which they first end.

    Args:
        traces: spans, clip by clip.
        work: of figures whose arithmetic is known.
        fell_back: what ran otherwise than requested, in any clip.
    """
    samples: dict[str, list[float]] = {}
    for spans in traces:
        for name, seconds in sampled(spans):
            samples.setdefault(name, []).append(seconds)
    figures = []
    for name, times in samples.items():
        figure = Figure(name=name, unit="s", samples=tuple(times), fell_back=fell_back)
        if name in work:
            share = work[name].seconds / figure.median
            figure = replace(figure, flops=work[name].flops, of_ceiling=share)
        figures.append(figure)
    return figures


def sampled(spans: Iterable[Span]) -> Iterator[tuple[str, float]]:
    """Yield (name of a figure, seconds) for each span of a clip that belongs to a figure."""
    spans = list(spans)
    stages = [span for span in spans if span.name in ("draft", "highres")]
    for span in spans:
        if span.name.startswith("step "):
            stage = next(s for s in stages if s.start <= span.start and span.end <= s.end)
            yield f"{stage.name} step", span.end - span.start
        elif span.name in SPANS:
            yield span.name, span.end - span.start
